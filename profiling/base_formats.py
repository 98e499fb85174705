"""What does each format of the base cost in perplexity, bytes and time?

    python profiling/base_formats.py                 # SmolLM2-135M-Instruct on 8,192 tokens of Python's help texts
    python profiling/base_formats.py --tiny

Perplexity is that of windows of 512 tokens, without adapters. Times are those of the forward passes over all windows,
and of one training step of 2 x 512 tokens that recomputes every block. Prints a table and one JSON line: format ->
`perplexity`, `base_bytes`, `forward_seconds`, `step_seconds`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from parts.example_models import model_folder
from parts.perplexity import perplexity
from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.checkpoints.hub import load_tokenizer
from qlora_lite.compute.host_memory import set_host_limits

WINDOW, WINDOWS = 512, 16
TINY_WINDOW, TINY_WINDOWS = 32, 2
FORMATS = {
    "bf16": QuantConfig(format="none"),
    "int8 rows": QuantConfig(format="int8"),
    "int8 rows, int8 activations": QuantConfig(format="int8", int8_activations=True),
    "nf4": QuantConfig(format="nf4"),
    "nf4, int8 embedding and head": QuantConfig(format="nf4", embedding_format="int8"),
    "fp4": QuantConfig(format="fp4"),
}


def text_windows(folder: Path, window: int, windows: int) -> torch.Tensor:
    """Returns `(windows, window)` tokens of running text."""
    text = "\n".join(topics.values())[: 8 * window * windows]
    ids = load_tokenizer(folder)(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids[: window * windows].view(windows, window)


def base_bytes(model: Any) -> int:
    """Returns the bytes of all parameters and buffers, tied tensors once."""
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def measure(folder: Path, config: QuantConfig, windows: torch.Tensor) -> dict[str, float]:
    model = load_quantized(folder, config)
    size = base_bytes(model)
    set_host_limits()
    began = time.perf_counter()
    found = perplexity(model, windows)
    seconds = time.perf_counter() - began
    add_lora_(model, LoraConfig())
    steps: list[float] = []

    def batches() -> Any:
        for _ in range(4):
            start = time.perf_counter()
            yield {"input_ids": windows[:2], "labels": windows[:2]}
            steps.append(time.perf_counter() - start)

    train(model, batches(), TrainConfig(steps=4), progress=False)
    return {
        "perplexity": found,
        "base_bytes": size,
        "forward_seconds": seconds,
        "step_seconds": statistics.median(steps[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; without it SmolLM2-135M-Instruct")
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers")
    given = parser.parse_args()
    window, windows = (TINY_WINDOW, TINY_WINDOWS) if given.tiny else (WINDOW, WINDOWS)
    with tempfile.TemporaryDirectory() as scratch:
        if given.tiny or given.model is None:
            given.model = model_folder(given.tiny, Path(scratch))
        tokens = text_windows(given.model, window, windows)
        figures = {name: measure(given.model, config, tokens) for name, config in FORMATS.items()}
    table = Table("base", "perplexity", "MiB", "forward (s)", "step (s)", title=f"{tokens.numel():,} tokens")
    for name, row in figures.items():
        sizes = f"{row['base_bytes'] / 2**20:,.1f}"
        table.add_row(
            name, f"{row['perplexity']:.2f}", sizes, f"{row['forward_seconds']:.2f}", f"{row['step_seconds']:.2f}"
        )
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
