"""Does a script of trl learn with three changed lines what it learns with transformers, peft and bitsandbytes?

    python profiling/learn_like_trl.py            # 30 steps of SFT and of DPO: about half an hour on two cores
    python profiling/learn_like_trl.py --tiny     # random weights, in seconds: shows that the script works

Both sides train SmolLM2-135M-Instruct in NF4 with double quantization to turn messages into records, from the same A,
on the same batches in the same order, once with A and B in bf16, as trl rounds them, and once in fp32, as this library
keeps them. Each training runs in a process of its own, with `--tiny` all in one (parts/trl_learning_worker.py).

How far rounding alone moves the losses is shown by further runs of each side in bf16, whose A starts half a step of
bf16 away. The end of a run is the mean of the last third of its losses: `noise` is the largest distance between the
ends of two runs of one side, `difference` the distance between the mean ends of the sides, and `ratio` its share of
the noise, or of 1 % of the peer's end if that is more. Prints the losses and ends with one JSON line: trainer ->
`first` (of both sides), `ours`, `peer` (their mean ends), `difference`, `noise`, `ratio`, and the same with `_fp32` of
the one run of each side in fp32, against the same noise. The exit status is 1 if the first losses differ by more than
1 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parts.example_models import model_folder
from parts.machine_floor import cpu_name

WORKER = Path(__file__).parent / "parts" / "trl_learning_worker.py"
TRAINERS = ("sft", "dpo")
SIDES = ("ours", "peer")
MOVES = 2  # runs of each side that start elsewhere
SHARE = 0.01  # of the end of the peer's losses: less than this is noise in any case
FIRST_TOLERANCE = 0.01


def run(group: list[dict[str, Any]]) -> Iterator[list[float]]:
    """Runs a group of trainings in one process, and yields the losses of each."""
    command = [sys.executable, str(WORKER), json.dumps(group)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{group[0]['trainer']} of {group[0]['side']} ended:\n{done.stderr.strip()[-2000:]}")
    yield from (json.loads(line)["losses"] for line in done.stdout.splitlines() if line.startswith('{"losses"'))


def end(losses: list[float]) -> float:
    """Returns the mean of the last third."""
    return statistics.mean(losses[-max(1, len(losses) // 3) :])


def distance(ours: list[float], peer: list[float], noise: float, suffix: str = "") -> dict[str, float]:
    """Returns how far apart the mean ends of the runs of both sides are."""
    mine, theirs = statistics.mean(ours), statistics.mean(peer)
    difference = abs(mine - theirs)
    ratio = difference / max(noise, SHARE * theirs)
    found = {"ours": mine, "peer": theirs, "difference": difference, "ratio": ratio}
    return {name + suffix: value for name, value in found.items()}


def verdict(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Returns the figures of one trainer from the losses of its runs."""
    ends = {name: end(values) for name, values in losses.items()}
    sides = {side: [ends[name] for name in ends if name == side or name.startswith(f"{side}, ")] for side in SIDES}
    noise = max(max(values) - min(values) for values in sides.values())
    found: dict[str, Any] = {"first": [losses[side][0] for side in SIDES], "noise": noise}
    found |= distance(sides["ours"], sides["peer"], noise)
    return found | distance([ends["ours fp32"]], [ends["peer fp32"]], noise, "_fp32")


def runs(usual: dict[str, Any], moves: int) -> dict[str, dict[str, Any]]:
    """Returns the work of each run by its name."""
    found = dict[str, dict[str, Any]]()
    for side in SIDES:
        work = usual | {"side": side}
        found |= {side: work, f"{side} fp32": work | {"dtype": "float32"}}
        found |= {f"{side}, moved {seed}": work | {"moved": seed} for seed in range(1, moves + 1)}
    return found


def table(trainer: str, losses: dict[str, list[float]]) -> Table:
    drawn = Table("step", *losses, title=f"losses of {trainer}")
    for step, row in enumerate(zip(*losses.values(), strict=True), start=1):
        drawn.add_row(str(step), *(f"{loss:.4f}" for loss in row))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers, three steps of sft")
    given = parser.parse_args()
    steps, trainers, moves = (3, ("sft",), 1) if given.tiny else (given.steps, given.trainers, MOVES)
    found, console = dict[str, dict[str, Any]](), Console(width=max(100, Console().width))
    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(given.tiny, Path(scratch))
        for trainer in trainers:
            usual = {"trainer": trainer, "model": str(model), "steps": steps, "tokens": 256}
            works = runs(usual, moves)
            groups = [list(works.values())] if given.tiny else [[work] for work in works.values()]
            losses = dict(zip(works, (values for group in groups for values in run(group)), strict=True))
            console.print(table(trainer, losses))
            found[trainer] = verdict(losses)
    print(json.dumps({"cpu": cpu_name(), **found}))
    for trainer, figures in found.items():
        mine, theirs = figures["first"]
        if abs(mine - theirs) > FIRST_TOLERANCE * theirs:
            raise SystemExit(f"error: the first losses of {trainer} differ by more than 1 %: {mine:.4f}, {theirs:.4f}")


if __name__ == "__main__":
    main()
