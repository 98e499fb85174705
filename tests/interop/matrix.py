"""Do peft and this library read each other's adapters, and compute the same with them?

    python tests/interop/matrix.py                          # every case; some minutes on two cores
    python tests/interop/matrix.py --family gpt2 --base nf4 --variant dora
    python tests/interop/matrix.py --quick                  # a few cases, in seconds
    python tests/interop/matrix.py --quick --disturb value  # every case must fail

Small random models are adapted and trained a few steps on each side, by real peft over transformers and bitsandbytes
and by this library, and saved; the other side loads. A case is one subject (cases.py) in one direction:

    from_peft  peft's adapter here: equal logits in fp32
    to_peft    our adapter in peft: equal logits in fp32
    bf16       peft's adapter on both in bfloat16: our error against fp32 is at most peft's, with a margin
    merge      exported here and merged by peft's `merge_and_unload`: equal weights, equal logits
    files      our adapter loaded and saved again is the same file, after peft loaded and saved it too

It passes, or is refused by peft (it raises for what it is asked), or is refused by us (an error class of ours, by a
sentence that the table of known refusals has); all else is a failure. `--disturb` changes one value, or alpha, of every
adapter between saving and loading, so that what passes then is a case that cannot fail. Prints a matrix for each base,
one letter for each direction, the reasons, and one JSON line: `cases`, `passed`, `refused_by_peft`, `refused_by_us`,
`failed`.
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
    """Warnings of the other libraries are not what is asked here; a process computes in one thread."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def run_some(some: list[Subject], disturb: str | None) -> list[Result]:
    """Results of these subjects, in this process."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        return [result for subject in some for result in results(workshop, subject, disturb)]


def parts(chosen: Iterable[Subject], largest: int = 40) -> Iterator[list[Subject]]:
    """The subjects in lists of one family and base each, whose models are then made a few times only."""
    groups: dict[tuple[str, str], list[Subject]] = defaultdict(list)
    for subject in chosen:
        groups[subject.family, subject.base].append(subject)
    for group in groups.values():
        yield from (group[first : first + largest] for first in range(0, len(group), largest))


def run(chosen: list[Subject], disturb: str | None, jobs: int) -> Iterator[Result]:
    """All results, by as many processes."""
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
    """Family and variant against targets: a letter for each direction."""
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
    """Every reason why a case did not pass, or passed with a remark, how often, and the first such case."""
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
    """How many cases there were, and how they ended."""
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
    parser.add_argument("--disturb", choices=("value", "alpha"), help="between saving and loading: no case may pass")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--quick", "--tiny", action="store_true", help="a few cases, in seconds, in one process")
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
