"""Are files lost to kills, full disks or bad input, is resuming exact, and does memory stay flat over a long run?

    python tests/reliability/endure.py            # everything: about ten minutes on two cores (make endure)
    python tests/reliability/endure.py --tiny     # a sample, in a minute or two

Prints a table, and one JSON line with these keys:

kills         Processes killed by SIGKILL at every change on disk that a run, a resumed run, an export, a merge or a
              packed checkpoint makes, in the middle of writes, and at random times (killed_runs.py, killed_saves.py).
kills_lost    Kills after which a file was neither the old nor the new one, or the same call did not finish.
stops         Commands that got SIGTERM, Ctrl-C or two of them inside a chosen function (stopped_commands.py).
stops_wrong   Stops with another exit status, message or set of files than promised.
bad_inputs    Damaged or inconsistent files of five kinds, and wrong arguments of every command (bad_inputs.py,
              bad_arguments.py).
bad_inputs_wrong  Bad inputs that were accepted, or not refused in one sentence, in little time and memory.
full_disks    Exports, packed checkpoints, runs and metrics written to disks that are too full or read-only
              (full_disks.py); null where the process may not mount disks.
full_disks_wrong  Writes that lost a file, left one behind, or did not finish once there was room.
resume_cases  Kinds of runs that were interrupted and resumed (resumed_runs.py).
resume_unequal  Resumed runs that differ in any bit from the uninterrupted run.
soak_steps    Steps of one long run (long_run.py).
soak_slope_bytes_per_step  Growth of resident memory over the last three quarters of that run.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bad_arguments import bad_arguments
from bad_inputs import FAMILIES, run_cases
from example_model import make_tiny_model
from full_disks import full_disks
from killed_runs import MOMENTS, kills_of_a_run
from killed_saves import SAVES, killed_saves
from long_run import soak
from resumed_runs import cases, unequal
from stopped_commands import all_stops

# Cases of each family of files. A whole checkpoint takes longer than a safetensors file, index, adapter or records.
INPUTS, CHECKPOINT_INPUTS, SOAK_STEPS = 5000, 1500, 2000
TINY_INPUTS, TINY_CHECKPOINT_INPUTS, TINY_SOAK_STEPS = 60, 15, 40
TINY_EVERY = 60
SAVE_MOMENTS, TINY_MOMENTS = 10, 1
TINY_ARGUMENTS_EVERY, TINY_STOPS = 40, 2


def _kills(folder: Path, tiny: bool, console: Console) -> tuple[int, int]:
    model = make_tiny_model(folder / "model", hidden=32)
    killed, lost = 0, 0
    every, moments, save_moments = (TINY_EVERY, TINY_MOMENTS, TINY_MOMENTS) if tiny else (1, MOMENTS, SAVE_MOMENTS)
    tries = list(kills_of_a_run(model, folder / "run", every, moments))
    for save in SAVES[:1] if tiny else SAVES:
        (folder / "saves" / "there").mkdir(parents=True, exist_ok=True)
        found = killed_saves(model, folder / "saves" / "there", save, 20 if tiny else 1, save_moments)
        tries += [(save.name, kill, problems) for kill, problems in found]
    for name, kill, problems in tries:
        killed += 1
        lost += bool(problems)
        for problem in problems:
            console.print(f"{name}, killed {kill}: {problem}")
    return killed, lost


def _inputs(folder: Path, tiny: bool, console: Console) -> tuple[int, int]:
    small = functools.partial(make_tiny_model, hidden=32)
    arguments, refused_wrong = bad_arguments(folder, small, TINY_ARGUMENTS_EVERY if tiny else 1)
    counts = (TINY_INPUTS, TINY_CHECKPOINT_INPUTS) if tiny else (INPUTS, CHECKPOINT_INPUTS)
    wrong = refused_wrong + run_cases(FAMILIES[:4], range(counts[0])) + run_cases(FAMILIES[4:], range(counts[1]))
    for problem in wrong[:20]:
        console.print(problem, markup=False)
    return arguments + 4 * counts[0] + counts[1], len(wrong)


def _stops(folder: Path, tiny: bool, console: Console) -> tuple[int, int]:
    found = all_stops(folder, functools.partial(make_tiny_model, hidden=32), TINY_STOPS if tiny else None)
    for name, problems in found:
        for problem in problems:
            console.print(f"{name}: {problem}", markup=False)
    return len(found), sum(bool(problems) for _, problems in found)


def _resumes(folder: Path, tiny: bool, console: Console) -> tuple[int, int]:
    model, tried, wrong = make_tiny_model(folder / "resumed"), 0, 0
    for case in cases(tiny):
        with tempfile.TemporaryDirectory() as scratch:
            found = unequal(model, Path(scratch), case)
        tried += 1
        wrong += bool(found)
        for problem in found:
            console.print(f"{case}: {problem}", markup=False)
    return tried, wrong


def _disks(folder: Path, tiny: bool, console: Console) -> tuple[int | None, int | None]:
    tried, wrong = full_disks(make_tiny_model(folder / "on_disks", hidden=32), folder / "disks", tiny)
    for problem in wrong[:20]:
        console.print(problem, markup=False)
    return tried, None if tried is None else len(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="try a sample of each kind")
    tiny = parser.parse_args().tiny
    torch.set_num_threads(1)
    console, began, table = Console(), time.monotonic(), Table("kind", "tried", "went wrong")

    def done(*row: object) -> None:
        table.add_row(*map(str, row))
        console.print(f"{time.monotonic() - began:.0f} s: {row[0]}", highlight=False)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        kills, kills_lost = _kills(folder, tiny, console)
        done("kills", kills, kills_lost)
        disks, disks_wrong = _disks(folder, tiny, console)
        done("full disks", *("not permitted" if value is None else value for value in (disks, disks_wrong)))
        (folder / "stops").mkdir()
        stops, stops_wrong = _stops(folder / "stops", tiny, console)
        done("signals", stops, stops_wrong)
        bad_inputs, bad_inputs_wrong = _inputs(folder / "arguments", tiny, console)
        done("bad inputs", bad_inputs, bad_inputs_wrong)
        resume_cases, resume_unequal = _resumes(folder, tiny, console)
        done("resumed runs", resume_cases, resume_unequal)
        seen = soak(folder / "soak", TINY_SOAK_STEPS if tiny else SOAK_STEPS)
        verdict = "flat" if seen.is_flat else "growing"
        slope = f"{seen.slope:.0f} ± {seen.slope_error:.0f} bytes a step"
        done("steps of a long run", seen.steps, f"{verdict}: {slope}, {seen.leaked} tensors, files {seen.files}")
    console.print(table)
    figures = {
        "kills": kills,
        "kills_lost": kills_lost,
        "full_disks": disks,
        "full_disks_wrong": disks_wrong,
        "stops": stops,
        "stops_wrong": stops_wrong,
        "bad_inputs": bad_inputs,
        "bad_inputs_wrong": bad_inputs_wrong,
        "resume_cases": resume_cases,
        "resume_unequal": resume_unequal,
        "soak_steps": seen.steps,
        "soak_slope_bytes_per_step": round(seen.slope, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
