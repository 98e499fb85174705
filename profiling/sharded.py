"""What does a base in shares cost: memory, bytes over the wire, time, and what is lost if a process ends?

    python profiling/sharded.py                      # the 300M shape over gloo, two and four processes: some minutes
    python profiling/sharded.py --shape llama-1b
    python profiling/sharded.py --tiny               # a small random model, in seconds; ends no process

Processes of one thread each load a base as NF4 with double quantization and train rank 8 on all linear layers, with all
blocks recomputed (parts/shard_worker.py): with the base in shares, and whole in each (data parallel). Gradients are
compared in fp32 on the small model, with those of one process. Processes are ended by tests/reliability/
lost_processes.py. Prints a table and one JSON line:

gradient_error    largest relative difference of a gradient of the first step from one process's
base_share        bytes of the frozen base in a process by those of the whole one, four processes
gathered_ratio    bytes that a process receives in a step by packed bytes x (W - 1) / W; embedding and head included
time_ratio        processor seconds of a step, shares by data parallel, two processes, medians
read_ratio        bytes read from the checkpoint by all four processes together, by those of its files
load_peak         resident peak of a process while it loads, above an empty process and its share, in bytes
hung, lost, told, unequal   of so many `moments` at which a process ends, those after which another one went on, steps
                  were lost, a wrong reason was told, or the resumed run ended differently; null where none was ended
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from parts.example_models import make_tiny_model
from parts.model_shapes import SHAPES, make_shape
from parts.shard_worker import ShardWork

WORKER = Path(__file__).resolve().parent / "parts" / "shard_worker.py"
LOST_PROCESSES = Path(__file__).resolve().parents[1] / "tests" / "reliability" / "lost_processes.py"
ENDS = ("moments", "hung", "told", "lost", "unequal")
AIMS = {"gradient_error": 1e-6, "base_share": 0.27, "gathered_ratio": 3.05, "time_ratio": 1.25, "read_ratio": 1.02}
AIMS |= {"load_peak": 300 << 20, "hung": 0, "lost": 0}


def work(given: ShardWork, processes: int) -> list[dict[str, Any]]:
    """Runs the workers of one run and returns the figures of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= {"ACCELERATE_USE_CPU": "true", "QLORA_LITE_CHOICES": "default"}
    started = []
    for rank in map(str, range(processes)):
        own = shared | {"RANK": rank, "LOCAL_RANK": rank}
        command, pipe = [sys.executable, str(WORKER), given.to_json()], subprocess.PIPE
        started.append(subprocess.Popen(command, env=os.environ | own, stdout=pipe, stderr=pipe, text=True))
    ended = [(process, *process.communicate()) for process in started]
    for process, _, complaint in ended:
        if process.returncode:
            raise SystemExit(f"a worker of {processes} ended:\n{complaint.strip()[-2000:]}")
    return [json.loads(printed.splitlines()[-1]) for _, printed, _ in ended]


def gradient_error(folder: Path, scratch: Path, tiny: bool) -> float:
    """Returns the largest relative difference from one process, over gradients, two and four processes, and modes."""
    largest = 0.0
    for checkpointing in ("none",) if tiny else ("full", "none"):
        given = ShardWork(str(folder), False, str(scratch / "alone"), 6, 12, 1, checkpointing, "float32")
        work(given, 1)
        wanted = load_file(given.gradients)
        for processes in (2,) if tiny else (2, 4):
            work(shared := replace(given, shard=True, gradients=str(scratch / "shared")), processes)
            found = load_file(shared.gradients)
            largest = max(largest, *(float((found[k] - v).norm() / v.norm()) for k, v in wanted.items()))
    return largest


def step_seconds(figures: list[dict[str, Any]]) -> float:
    """Returns the processor seconds of a step of a process. The first step has checks of the model, and is left out."""
    return statistics.median(second for one in figures for second in one["cpu_seconds"][1:])


def ends_of_processes() -> dict[str, int]:
    """Returns the last line of lost_processes.py."""
    done = subprocess.run([sys.executable, str(LOST_PROCESSES)], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(sides: dict[str, list[dict[str, Any]]]) -> Table:
    drawn = Table("base", "processes", "held of the base, MiB", "processor, s a step", "received in a step, MiB")
    for name, figures in sides.items():
        held, received = max(one["held"] for one in figures), max(one["received"][-1] for one in figures)
        sizes = [f"{held / 2**20:,.1f}", f"{step_seconds(figures):.2f}", f"{received / 2**20:,.1f}"]
        drawn.add_row(name.partition(",")[0], str(len(figures)), *sizes)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-300m")
    parser.add_argument("--tokens", type=int, default=256, help="of a row; a batch has two rows")
    parser.add_argument("--without-ends", action="store_true", help="end no process: that takes most of the time")
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        small = make_tiny_model(scratch / "small")
        folder = make_tiny_model(scratch / "tiny", 2, 256) if given.tiny else make_shape(given.shape)
        shape = ShardWork(str(folder), True, str(scratch / "gradients"), 2, 32 if given.tiny else given.tokens)
        sides = {"shares, 2": work(shape, 2), "whole, 2": work(replace(shape, shard=False), 2)}
        sides["shares, 4"] = work(replace(shape, steps=2, rows=4), 4)
        results: dict[str, float | None] = {"gradient_error": gradient_error(small, scratch, given.tiny)}
        files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    two, four = sides["shares, 2"], sides["shares, 4"]
    results["base_share"] = max(one["held"] / one["whole"] for one in four)
    results["gathered_ratio"] = max(one["received"][-1] / (one["shared"] / 2) for one in two)
    results["time_ratio"] = step_seconds(two) / step_seconds(sides["whole, 2"])
    results["read_ratio"] = sum(one["read"] for one in four) / files
    results["load_peak"] = max(one["load_peak"] - one["held"] for one in four)
    results |= dict.fromkeys(ENDS) if given.tiny or given.without_ends else ends_of_processes()
    console = Console(width=max(110, Console().width))
    console.print(table(sides))
    for name, aim in AIMS.items():
        if (found := results[name]) is not None:
            console.print(f"{name}: {found:.3g}, aim at most {aim:.3g}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
