"""Where do the bytes of one training step go?

    python profiling/step_memory.py                    # SmolLM2-135M-Instruct, NF4, rank 16, 2 x 512 tokens
    python profiling/step_memory.py --model DIR --format int8 --checkpointing none
    python profiling/step_memory.py --tiny

Prints a table of the phases, and one JSON line: `model`, `phases` (in bytes).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from parts.example_models import model_folder
from qlora_lite import LoraConfig, QuantConfig, TrainConfig
from qlora_lite.memory.report import render
from qlora_lite.training.config import checkpointing_named
from qlora_lite.training.loop import profile_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; without it SmolLM2-135M-Instruct")
    parser.add_argument("--format", default="nf4", help="nf4, fp4, int8 or none")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--checkpointing", default="full", help="full, none, or a size such as 300MiB")
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers, 2 x 32 tokens")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.tiny:
            given.tokens = 32
        if given.tiny or given.model is None:
            given.model = model_folder(given.tiny, Path(scratch))
        report = profile_steps(
            given.model,
            QuantConfig(format=given.format),
            LoraConfig(rank=given.rank, alpha=2 * given.rank),
            TrainConfig(steps=2, checkpointing=checkpointing_named(given.checkpointing)),
            rows=given.rows,
            tokens=given.tokens,
        )
        print(render(report))
        print(json.dumps({"model": str(given.model), "phases": report.to_json()["phases"]}))


if __name__ == "__main__":
    main()
