"""Does every causal language model of transformers load, train, save, export and reload here, with equal results?

    python tests/interop/families.py                          # all: some minutes on two cores (make interop)
    python tests/interop/families.py --family falcon zamba2 llama4@whole
    python tests/interop/families.py --quick                  # a few families, in seconds

For each family a tiny random model is built (family_models.py) and goes through these checks (family_checks.py):

    plain    unpacked in fp32: tensors and logits are those of transformers, bit for bit and to 1e-4
    half     unpacked in bf16: tensors have the dtypes and bits of transformers'
    packed   NF4: it runs, and adapters go on all linear layers
    trained  a step: loss and gradients are those of cross-entropy and autograd
    adapter  saved, and loaded into a fresh model: equal logits
    export   merged: equal logits in transformers and here
    disk     merged on disk: the tensors that the export in memory has
    folder   written packed, and loaded again: equal logits
    rows     two examples packed into a row: the loss of both by themselves
    peft     peft loads the adapter: equal logits, or `inspect` says that it does not

A check ends equal, refused (by a sentence of this package), different, or failed (any other exception). Prints a table,
the reasons, and one JSON line: `families`, those `equal` from `plain` to `disk`, their `share`, `refused` by sentence,
`different`, `failed`, `not_built`. `--markdown` writes docs/families.md. Exit status 1 if any check is different or
failed, or if fewer than 95% of the families are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from family_checks import CHECKS, DIFFERENT, EQUAL, FAILED, NOT_BUILT, REFUSED, STATUSES, Result, results
from family_models import families
from family_page import general, grouped, is_whole, page

LETTERS = {EQUAL: "+", REFUSED: "r", DIFFERENT: "D", FAILED: "F", NOT_BUILT: "-"}
# What a family has to pass to count: packed folders and rows, and peft, are beside it.
MAIN_LINE = ("plain", "half", "packed", "trained", "adapter", "export", "disk")
LEAST_SHARE = 0.95
# One of each kind: a linear layer of its own, blocks with shared weights, experts with dense layers beside them, stacks
# that stay unpacked, a decoder's cross-attention, and tokens that see later ones.
QUICK = ("falcon", "zamba2", "deepseek_v3", "jetmoe", "bart", "bert+encoder")


def quiet() -> None:
    """Silences other libraries, and makes this process compute in one thread."""
    os.environ.update(HF_HUB_OFFLINE="1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def run_one(family: str) -> list[Result]:
    """Returns the results of a family, computed in this process."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        return list(results(family, Path(folder)))


def run(chosen: list[str], jobs: int) -> Iterator[Result]:
    """Yields all results, computed by `jobs` processes."""
    if jobs == 1:
        for family in chosen:
            yield from run_one(family)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, max_tasks_per_child=40) as pool:
        for number, found in enumerate(pool.map(run_one, chosen), 1):
            yield from found
            print(f"{number} of {len(chosen)} families", file=sys.stderr)


def outcomes(found: list[Result]) -> Table:
    """Returns a table of the families whose checks are not all equal, with a letter for each check."""
    table = Table("family", *CHECKS)
    whole = 0
    for family, checks in grouped(found).items():
        whole += is_whole(checks.values())
        if not is_whole(checks.values()) and "built" not in checks:
            table.add_row(family, *(LETTERS[checks[check].status] if check in checks else "" for check in CHECKS))
    table.title = f"{whole} families are equal in every check without a setting, and these are not"
    return table


def sentences(found: list[Result]) -> dict[tuple[str, str, str], list[Result]]:
    """Returns the results that have a reason, by status, check, and what their reasons have in common."""
    alike: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for result in found:
        if result.why:
            alike[result.status, result.check, general(result.why)].append(result)
    return dict(sorted(alike.items(), key=lambda item: (STATUSES.index(item[0][0]), item[0][1], -len(item[1]))))


def reasons(found: list[Result]) -> Table:
    """Returns a table of the reasons, with their counts and first families."""
    table = Table("status", "check", "families", "reason", "first", title="reasons")
    for (status, check, _), alike in sentences(found).items():
        table.add_row(status, check, str(len(alike)), alike[0].why[:400], alike[0].family)
    return table


def figures(found: list[Result]) -> dict[str, object]:
    """Returns the counts, and the families with their reasons."""
    built = {family: checks for family, checks in grouped(found).items() if "built" not in checks}
    equal = sum(all(n in checks and checks[n].status == EQUAL for n in MAIN_LINE) for checks in built.values())
    counts = Counter(result.status for result in found)
    refused = [
        {"check": check, "families": [result.family for result in alike], "sentence": alike[0].why}
        for (status, check, _), alike in sentences(found).items()
        if status == REFUSED
    ]
    wrong = {
        status: [f"{result.family} {result.check}: {result.why}" for result in found if result.status == status]
        for status in (DIFFERENT, FAILED)
    }
    return {
        "families": len(built),
        "equal": equal,
        "share": round(equal / max(1, len(built)), 4),
        "equal_in_every_check": sum(is_whole(checks.values()) for checks in built.values()),
        "checks": sum(counts[status] for status in STATUSES if status != NOT_BUILT),
        "checks_equal": counts[EQUAL],
        "checks_refused": counts[REFUSED],
        "refused": refused,
        **wrong,
        "not_built": [result.family for result in found if result.status == NOT_BUILT],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", nargs="+", metavar="NAME", help="model types, name+variant or name@whole")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--markdown", type=Path, help="file to write the page of the documentation to")
    parser.add_argument(
        "--results", type=Path, help="file to write each result to as it is found, one JSON object a line"
    )
    parser.add_argument("--quick", "--tiny", action="store_true", help="run a few families, in seconds, in one process")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    quiet()
    known = families()
    chosen = given.family or (list(QUICK) if given.quick else known)
    if unknown := [family for family in chosen if family not in known]:
        raise SystemExit(f"transformers has no causal language model of type {', '.join(unknown)}")
    found: list[Result] = []
    with contextlib.nullcontext() if given.results is None else given.results.open("w", encoding="utf-8") as lines:
        for result in run(chosen, 1 if given.quick else min(given.jobs, len(chosen))):
            found.append(result)
            if lines is not None:
                print(json.dumps(vars(result)), file=lines, flush=True)
    if given.markdown is not None:
        given.markdown.write_text(page(found, MAIN_LINE), encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(outcomes(found))
    console.print(", ".join(f"{letter} {status}" for status, letter in LETTERS.items()))
    console.print(reasons(found))
    done = figures(found)
    print(json.dumps(done))
    whole = not given.family and not given.quick
    if done[DIFFERENT] or done[FAILED] or (whole and float(str(done["share"])) < LEAST_SHARE):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
