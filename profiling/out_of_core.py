"""How much memory does training take with the base on disk, and how much time, beside the base in memory?

    python profiling/out_of_core.py                       # the 1.1B shape, 1 x 512 tokens: some minutes on two cores
    python profiling/out_of_core.py --shape llama3-8b --embedding-format int8 --optimizer adamw8bit --tokens 256
    python profiling/out_of_core.py --disk-only ...       # where the base does not fit into memory
    python profiling/out_of_core.py --tiny                # a random model of three small layers, in seconds

Random weights of a known shape as NF4 with double quantization, rank 16 on all linear layers, every block recomputed.
The base is packed to disk in a process of its own, and each side trains in one too (parts/disk_worker.py). Before every
step the base's file is dropped from the page cache. Peaks are those of the whole process, loading included, anonymous
and file pages, above an empty process with the same imports. Prints a table and one JSON line:

time_ratio, cpu_ratio    a step on disk by one in memory, median: seconds, and processor seconds of both its threads
resident_ratio           the peaks, disk by memory
unequal                  losses and adapters that differ: 0 is right
bytes_read               from the disk in a step, median; on_disk: the bytes of the base that lie there
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parts.disk_worker import DiskWork
from parts.example_models import make_tiny_model
from parts.model_shapes import SHAPES, make_shape

WORKER = Path(__file__).resolve().parent / "parts" / "disk_worker.py"
MIB = 1 << 20
# The first step has checks of the model and allocates what later ones use again.
WARM_UP_STEPS = 1
# The aims. Results that miss them are printed all the same.
AIMS = {"time_ratio": 1.25, "resident_ratio": 0.45}


def work(given: DiskWork) -> dict[str, Any]:
    """Runs one worker and returns its figures."""
    done = subprocess.run([sys.executable, str(WORKER), given.to_json()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the worker with the base on {given.base} ended:\n{done.stderr.strip()[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def median(figures: dict[str, Any], key: str) -> float:
    return float(statistics.median(figures[key][WARM_UP_STEPS:]))


def compare(disk: dict[str, Any], memory: dict[str, Any] | None) -> dict[str, float | None]:
    """Returns the figures of the last line. memory: None where that side was not run."""
    found: dict[str, float | None] = dict.fromkeys(("time_ratio", "cpu_ratio", "resident_ratio", "unequal"))
    if memory is not None:
        found["time_ratio"] = median(disk, "seconds") / median(memory, "seconds")
        found["cpu_ratio"] = median(disk, "cpu_seconds") / median(memory, "cpu_seconds")
        found["resident_ratio"] = disk["peak"] / memory["peak"]
        different = sum(one != other for one, other in zip(disk["losses"], memory["losses"], strict=True))
        found["unequal"] = different + (disk["adapters"] != memory["adapters"])
        found |= {"memory_peak": memory["peak"], "memory_step_seconds": median(memory, "seconds")}
    return found | {
        "disk_peak": disk["peak"],
        "disk_step_seconds": median(disk, "seconds"),
        "empty_process": disk["empty"],
        "on_disk": disk["on_disk"],
        "bytes_read": median(disk, "bytes_read"),
    }


def table(sides: dict[str, dict[str, Any]]) -> Table:
    drawn = Table("base", "step, s", "processor, s", "read in a step, MiB", "peak above an empty process, MiB")
    for name, one in sides.items():
        sizes = (f"{size / MIB:,.0f}" for size in (median(one, "bytes_read"), one["peak"]))
        drawn.add_row(name, *(f"{median(one, key):.2f}" for key in ("seconds", "cpu_seconds")), *sizes)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape's, for less disk and time")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4, help="with one to warm up")
    parser.add_argument("--embedding-format", choices=("none", "int8"), default="none")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw")
    parser.add_argument("--disk-only", action="store_true", help="leave out the side with the base in memory")
    parser.add_argument("--tiny", action="store_true", help="a random model of three small layers")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.tiny:  # its packed base is not kept
            os.environ["QLORA_LITE_CACHE"] = scratch
        folder = (
            make_tiny_model(Path(scratch) / "tiny", 3, 512) if given.tiny else make_shape(given.shape, given.layers)
        )
        tokens = 64 if given.tiny else given.tokens
        disk = DiskWork(str(folder), "disk", given.embedding_format, given.optimizer, tokens, given.steps)
        packed = work(replace(disk, steps=0))
        sides = {"disk": work(disk)}
        if not given.disk_only:
            sides["memory"] = work(replace(disk, base="memory"))
    results = compare(sides["disk"], sides.get("memory"))
    console = Console(width=max(100, Console().width))
    console.print(table(sides))
    console.print(
        f"packing (or opening what was packed before): {packed['load_seconds']:.1f} s, "
        f"{packed['load_peak'] / MIB:,.0f} MiB"
    )
    for name, aim in AIMS.items():
        if results[name] is not None:
            console.print(f"{name}: {results[name]:.2f}, aim at most {aim}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
