"""Loads and trains in one of several processes, with the base in shares or whole; sharded.py starts it.

    RANK=0 WORLD_SIZE=2 ... python profiling/parts/shard_worker.py '{"model": "...", "shard": true}'

Prints a JSON line: bytes of the frozen base in this process and of the whole one, bytes read from the checkpoint, the
resident peak while loading above an empty process, processor seconds and received bytes of each step, and losses. The
first process writes the gradients of the first step to `gradients`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import save_file

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.checkpoints import safetensors_read
from qlora_lite.checks import dtype_named
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.memory.counters import resident_bytes
from qlora_lite.sharding.base import sharded_base
from qlora_lite.training.step import TrainingStep

TOKEN_IDS = 100  # ids that every tokenizer has


@dataclass(frozen=True)
class ShardWork:
    """The work of one worker."""

    model: str
    shard: bool
    gradients: str
    rows: int = 4
    tokens: int = 64
    steps: int = 3
    checkpointing: str = "full"
    dtype: str = "bfloat16"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def count_reads() -> list[int]:
    """Makes reads of tensors count their bytes, in the list that is returned."""
    counted, read = [0], safetensors_read.StoredTensor._read

    def counting(self: Any, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        found = read(self, offset, shape)
        counted[0] += found.nbytes
        return found

    safetensors_read.StoredTensor._read = counting  # type: ignore[method-assign]
    return counted


def keep_first_gradients(path: str) -> None:
    """Writes the gradients of the first step, summed over all processes, in the first process."""
    update = TrainingStep._update

    def keeping(self: TrainingStep, *arguments: Any) -> float:
        if self.number == 1 and self.processes.is_first:
            save_file({name: value.grad.clone() for name, value in self.run.trained.items()}, path)  # type: ignore[union-attr]
        return update(self, *arguments)

    TrainingStep._update = keeping  # type: ignore[method-assign]


def run(work: ShardWork) -> dict[str, Any]:
    import transformers.models.llama.modeling_llama  # noqa: F401

    read, empty = count_reads(), resident_bytes() or 0
    keep_first_gradients(work.gradients)
    model = load_quantized(work.model, QuantConfig(), dtype=dtype_named(work.dtype), shard=work.shard)
    whole = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    base = sharded_base(model)
    held = whole if base is None else whole - base.nbytes + base.own_bytes
    load = {"read": read[0], "load_peak": (resident_bytes("VmHWM") or 0) - empty, "held": held, "whole": whole}
    load["shared"] = 0 if base is None else base.nbytes
    torch.manual_seed(0)
    add_lora_(model, LoraConfig(rank=8, alpha=16, dropout=0.0, init_lora_weights="gaussian"))
    for number, value in enumerate(adapter_parameters(model).values()):
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
        value.data.add_(noise, alpha=0.02)
    ids = torch.randint(TOKEN_IDS, (work.rows, work.tokens), generator=torch.Generator().manual_seed(0))
    notes: list[tuple[float, int]] = []

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            notes.append((time.process_time(), 0 if base is None else base.group.received))
            yield {"input_ids": ids, "labels": ids}

    config = TrainConfig(steps=work.steps, checkpointing=work.checkpointing)
    result = train(model, batches(), config, progress=False)
    notes.append((time.process_time(), 0 if base is None else base.group.received))
    pairs = list(itertools.pairwise(notes))
    steps = {"cpu_seconds": [after[0] - before[0] for before, after in pairs]}
    return load | steps | {"received": [after[1] - before[1] for before, after in pairs], "losses": result.losses}


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(json.dumps(run(ShardWork(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
