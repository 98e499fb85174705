"""How much slower is a step under the profiler, with counters only (`phases`) and with every storage traced (`full`)?

    python profiling/profiler_cost.py           # SmolLM2-135M-Instruct, NF4, rank 16, 2 x 512 tokens: three minutes
    python profiling/profiler_cost.py --tiny    # a random model of two small layers

Trains with each mode in turn for several rounds, and compares the median seconds of a step with those without a
profiler. Prints a table and one JSON line: `plain_seconds`, `phases_ratio`, `full_ratio`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from parts.example_models import model_folder
from qlora_lite import LoraConfig, MemoryProfiler, QuantConfig, TrainConfig, add_lora_, load_quantized, train

ROUNDS, STEPS = 4, 4
MODES = {"plain": None, "phases": False, "full": True}


def step_seconds(model: Any, batch: dict[str, torch.Tensor], trace: bool | None) -> list[float]:
    """Returns the seconds of each step but the first, in which the profiler examines the model."""
    if trace is None:
        steps = train(model, [batch], TrainConfig(steps=STEPS), progress=False).steps
    else:
        with MemoryProfiler(model, trace=trace) as profiler:
            steps = train(model, [batch], TrainConfig(steps=STEPS), profiler=profiler, progress=False).steps
    return [step.tokens / step.tokens_per_second for step in steps[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers, 2 x 32 tokens")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = load_quantized(model_folder(given.tiny, Path(scratch)), QuantConfig())
    add_lora_(model, LoraConfig(rank=16, alpha=32))
    shape = (2, 32 if given.tiny else 512)
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(ROUNDS):
        for mode, trace in MODES.items():
            seconds[mode] += step_seconds(model, {"input_ids": ids, "labels": ids}, trace)
    medians = {mode: statistics.median(times) for mode, times in seconds.items()}
    table = Table("profiler", "seconds of a step, median", "relative to none")
    for mode, median in medians.items():
        table.add_row(mode, f"{median:.3f}", f"{median / medians['plain']:.3f}")
    Console(width=100).print(table)
    ratios = {f"{mode}_ratio": medians[mode] / medians["plain"] for mode in MODES if mode != "plain"}
    print(json.dumps({"plain_seconds": medians["plain"], **ratios}))


if __name__ == "__main__":
    main()
