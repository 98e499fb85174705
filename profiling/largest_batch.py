"""Which batches fit on a card of N GiB?

    python profiling/largest_batch.py                            # an 8B Llama-3 shape on 24 GiB
    python profiling/largest_batch.py --model DIR --memory 16GiB
    python profiling/largest_batch.py --tiny

Everything is predicted from the config; no weights are loaded. Prints a table with every format of the base, and one
JSON line: `memory`, and `rows`, the largest number of rows by setting and sequence length.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parts.example_models import make_tiny_model
from parts.model_shapes import SHAPES
from qlora_lite import LoraConfig, QuantConfig
from qlora_lite.checks import byte_count
from qlora_lite.planning.forecast import Forecaster, TrainingSetup
from qlora_lite.planning.memory_plan import DeviceMemory, largest_batch
from qlora_lite.planning.rehearsal import fake_tensors
from qlora_lite.planning.training_rehearsal import read_config

SETTINGS = {
    "nf4": QuantConfig(),
    "nf4, int8 embedding and head": QuantConfig(embedding_format="int8"),
    "int8": QuantConfig("int8"),
}
CHECKPOINTING = ("full", "none")


def shape_config(folder: Path) -> Any:
    """Returns the config of an 8B Llama-3."""
    from transformers import LlamaConfig

    LlamaConfig(**SHAPES["llama3-8b"]).save_pretrained(folder)
    return read_config(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="folder or config.json of a checkpoint; without it, the shape of an 8B Llama-3")
    parser.add_argument("--memory", default="24GiB", help="memory of the card")
    parser.add_argument("--context", default="512MiB", help="memory that its context takes (an assumption)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers on a card of 516 MiB")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.tiny:
            given.model, given.memory, given.lengths = make_tiny_model(Path(scratch)), "516MiB", [16]
        found = read_config(given.model) if given.model else shape_config(Path(scratch))
    memory = DeviceMemory(
        byte_count("--memory must be", given.memory), byte_count("--context must be", given.context), True
    )
    rows: dict[str, dict[str, int]] = {}
    with fake_tensors(accelerator=True):
        forecaster = Forecaster(found, accelerator=True)
        for name, quant in SETTINGS.items():
            for kind in CHECKPOINTING:
                setup = TrainingSetup(quant, LoraConfig(16, 32), 1, given.lengths[0], checkpointing=kind)
                found_rows = {n: largest_batch(forecaster, setup, memory, n).rows for n in given.lengths}
                rows[f"{name}, checkpointing {kind}"] = {str(length): count for length, count in found_rows.items()}
    table = Table(f"rows that fit into {given.memory}", *map(str, given.lengths))
    for name, counts in rows.items():
        table.add_row(name, *map(str, counts.values()))
    Console().print(table)
    print(json.dumps({"memory": memory.size, "rows": rows}))


if __name__ == "__main__":
    main()
