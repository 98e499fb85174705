"""How does a process grow when batches have many lengths, compared with transformers + peft + bitsandbytes?

    python profiling/varied_lengths.py               # 60 steps of 1 x 64 to 256 tokens: three minutes on two cores
    python profiling/varied_lengths.py --lengths 8   # with 8 different lengths
    python profiling/varied_lengths.py --tiny

SmolLM2-135M trains in NF4 on a CPU, and no block is recomputed. oneDNN keeps a program of some 650 KiB for each shape
of a product, up to 1,024 of them; this library keeps fewer (qlora_lite/compute/host_memory.py). Three processes take
steps in turn, with the same lengths: ours, ours with oneDNN's default limit, and the peer.

Prints a table and ends with one JSON line: for each process `seconds` (the median step) and `peaks` (the peak of the
process after each step, in bytes above the state after set-up), and `peak_ratio` and `time_ratio`, ours to the peer's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parts.example_models import model_folder
from parts.step_processes import Worker
from parts.step_worker import Work
from qlora_lite.compute.host_memory import PROGRAM_CACHES

MIB = 1 << 20
STEPS, TINY_STEPS = 60, 4
TOKENS, TINY_TOKENS = 256, 32
LENGTHS = 192
ALL_PROGRAMS = 1024  # oneDNN's default
SHOWN = 6  # columns of the table


@contextmanager
def default_program_caches() -> Iterator[None]:
    """Processes started within the block keep as many programs as oneDNN does by default."""
    usual = {names[0]: str(ALL_PROGRAMS) for names in PROGRAM_CACHES}
    os.environ.update(usual)
    try:
        yield
    finally:
        for name in usual:
            del os.environ[name]


def measured(works: dict[str, Work]) -> dict[str, dict[str, Any]]:
    workers = {}
    for name, work in works.items():
        if name == "ours":
            workers[name] = Worker(work)
            continue
        with default_program_caches():
            workers[name] = Worker(work)
    for _ in range(works["ours"].steps):
        for worker in workers.values():
            worker.step()
    found = {}
    for name, worker in workers.items():
        seconds = worker.finish()["seconds"]
        found[name] = {"seconds": seconds, "peaks": [line["peak"] for line in worker.figures if "peak" in line]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers")
    parser.add_argument("--lengths", type=int, default=LENGTHS, help="number of different lengths")
    given = parser.parse_args()
    if given.lengths < 1:
        parser.error(f"--lengths must be at least 1; got {given.lengths}")
    tiny = given.tiny
    for name in itertools.chain(*PROGRAM_CACHES):
        os.environ.pop(name, None)  # a limit of the caller would apply to every process
    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(tiny, Path(scratch))
        steps, tokens = (TINY_STEPS, TINY_TOKENS) if tiny else (STEPS, TOKENS)
        words = {"checkpointing": "none", "rows": 1, "tokens": tokens, "steps": steps, "lengths": given.lengths}
        ours = Work("ours", str(model), **words)
        found = measured({"ours": ours, "ours_with_all_programs": ours, "peft": replace(ours, side="peer")})
    shown = sorted({round(place * (steps - 1) / (SHOWN - 1)) for place in range(SHOWN)})
    table = Table("", "s of a step", *(f"step {step + 1}" for step in shown), title="peak so far, MiB above resident")
    for name, row in found.items():
        peaks = (f"{row['peaks'][step] / MIB:,.0f}" for step in shown)
        table.add_row(name.replace("_", " "), f"{row['seconds']:.2f}", *peaks)
    console = Console()
    console.width = max(100, console.width)
    console.print(table)
    ours_found, peer = found["ours"], found["peft"]
    ratios = {
        "peak_ratio": ours_found["peaks"][-1] / peer["peaks"][-1],
        "time_ratio": ours_found["seconds"] / peer["seconds"],
    }
    print(json.dumps({**found, **ratios}))


if __name__ == "__main__":
    main()
