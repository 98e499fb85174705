"""Do peft and this library read each other's adapters, and compute the same with them?

    python tests/interop/matrix.py                          # every case: some minutes on two cores (make interop)
    python tests/interop/matrix.py --family gpt2 --base nf4 --variant dora
    python tests/interop/matrix.py --quick                  # a few cases, in seconds
    python tests/interop/matrix.py --quick --disturb value  # every case must fail

Each side adapts small random models, trains them for a few steps and saves the adapter: peft over transformers and
bitsandbytes, and this library. The other side loads the adapter. A case is one subject (cases.py) in one direction:

    from_peft  peft's adapter, loaded here: equal logits in fp32
    to_peft    our adapter, loaded by peft: equal logits in fp32
    bf16       peft's adapter in bfloat16 on both sides: our error against fp32 is at most peft's, with a margin
    merge      exported here, and merged by peft's `merge_and_unload`: equal weights and logits
    files      our adapter, loaded and saved again: the same files, also after peft has loaded and saved it

A case passes, is refused by peft (any exception), or is refused by us (a QLoRAError with a sentence in the table of
known refusals). Anything else is a failure. `--disturb` changes one value, or alpha, of every adapter between saving
and loading, so that a case that still passes cannot fail at all. Prints a matrix for each base with one letter for each
direction, the reasons, and one JSON line: `cases`, `passed`, `refused_by_peft`, `refused_by_us`, `failed`.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cases import BASES, FAMILIES, VARIANTS, Subject, subjects, target_options
from checks import BY_PEFT, BY_US, FAILED, PASSED, Result, results
from trained_adapters import Workshop

LETTERS = {PASSED: "+", BY_PEFT: "p", BY_US: "u", FAILED: "F"}
STATUSES = tuple(LETTERS)
TARGETS = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in target_options(family)))
QUICK = tuple(
    Subject(*words.split())
    for words in ("llama dora attention none", "gpt2 lora embedding none", "qwen2 pissa all_linear nf4")
)


def quiet() -> None:
    """Silences warnings of other libraries, and makes this process compute in one thread."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def run_some(some: list[Subject], disturb: str | None) -> list[Result]:
    """Returns the results of these subjects, computed in this process."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        return [result for subject in some for result in results(workshop, subject, disturb)]


def parts(chosen: Iterable[Subject], largest: int = 40) -> Iterator[list[Subject]]:
    """Yields the subjects in lists of one family and base each, so that each model is made only a few times."""
    groups: dict[tuple[str, str], list[Subject]] = defaultdict(list)
    for subject in chosen:
        groups[subject.family, subject.base].append(subject)
    for group in groups.values():
        yield from (group[first : first + largest] for first in range(0, len(group), largest))


def run(chosen: list[Subject], disturb: str | None, jobs: int) -> Iterator[Result]:
    """Yields all results, computed by `jobs` processes."""
    if jobs == 1:
        yield from run_some(chosen, disturb)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn) as pool:
        waiting = [pool.submit(run_some, part, disturb) for part in parts(chosen)]
        for number, part in enumerate(waiting, 1):
            yield from part.result()
            print(f"{number} of {len(waiting)} parts", file=sys.stderr)


def matrix(found: list[Result], base: str) -> Table:
    """Returns a table of family and variant against targets, with a letter for each direction."""
    letters: dict[tuple[str, str, str], str] = defaultdict(str)
    for result in found:
        if result.subject.base == base:
            subject = result.subject
            letters[subject.family, subject.variant, subject.targets] += LETTERS[result.status]
    columns = [targets for targets in TARGETS if any(key[2] == targets for key in letters)]
    table = Table("family", "variant", *columns, title=f"base: {base}")
    for family, variant in dict.fromkeys(key[:2] for key in letters):
        table.add_row(family, variant, *(letters.get((family, variant, targets), "") for targets in columns))
    return table


def reasons(found: list[Result]) -> Table:
    """Returns a table of the reasons for refusals, failures and remarks, with their counts and first cases."""
    table = Table("status", "cases", "reason", "first case", title="reasons")
    first: dict[tuple[str, str], Result] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for result in found:
        if result.why:
            key = result.status, result.why
            counts[key] += 1
            first.setdefault(key, result)
    for (status, why), count in sorted(counts.items(), key=lambda item: (STATUSES.index(item[0][0]), -item[1])):
        result = first[status, why]
        table.add_row(status, str(count), why, f"{result.subject} {result.direction}")
    return table


def figures(found: list[Result]) -> dict[str, int]:
    """Returns the number of cases, and of each status."""
    counts = Counter(result.status for result in found)
    return {"cases": len(found), **{status: counts[status] for status in STATUSES}}


def chosen_subjects(given: argparse.Namespace) -> list[Subject]:
    if given.quick:
        return list(QUICK)
    wanted = [(given.family, "family"), (given.variant, "variant"), (given.targets, "targets"), (given.base, "base")]
    return [
        subject
        for subject in subjects(given.whole_product)
        if all(names is None or getattr(subject, part) in names for names, part in wanted)
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES)
    parser.add_argument("--variant", nargs="+", choices=VARIANTS)
    parser.add_argument("--targets", nargs="+", choices=TARGETS)
    parser.add_argument("--base", nargs="+", choices=BASES)
    parser.add_argument("--whole-product", action="store_true", help="every variant with every choice of targets")
    parser.add_argument("--disturb", choices=("value", "alpha"), help="change it before loading: no case may pass")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--quick", "--tiny", action="store_true", help="run a few cases, in seconds, in one process")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    quiet()
    found = list(run(chosen_subjects(given), given.disturb, 1 if given.quick else given.jobs))
    console = Console(width=None if sys.stdout.isatty() else 200)
    for base in BASES:
        if any(result.subject.base == base for result in found):
            console.print(matrix(found, base))
    console.print(", ".join(f"{letter} {status}" for status, letter in LETTERS.items()))
    console.print(reasons(found))
    counts = figures(found)
    print(json.dumps(counts))
    if counts[FAILED if given.disturb is None else PASSED]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
