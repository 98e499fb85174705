"""Compares interrupted and resumed runs with uninterrupted ones, bit for bit. Part of endure.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.checkpoints.safetensors_read import read_safetensors

STEPS = 6


@dataclass(frozen=True)
class ResumeCase:
    """One kind of run, interrupted after `stop` of STEPS steps."""

    format: str
    optimizer: str
    checkpointing: str | int
    accumulation: int
    dropout: float
    stop: int


def cases(tiny: bool) -> Iterator[ResumeCase]:
    """Returns every combination of settings, or a few of them."""
    everything = itertools.product(
        ("nf4", "int8"), ("adamw", "adamw8bit"), ("full", "none", 40 << 20), (1, 3), (0.0, 0.2), (1, 4)
    )
    return (ResumeCase(*words) for number, words in enumerate(everything) if not tiny or number % 24 == 5)


def _batches() -> list[dict[str, Tensor]]:
    """Returns five batches, so that a run of six steps ends in the middle of an epoch."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 100, (2, 8 + number), generator=generator) for number in range(5)]
    return [{"input_ids": row, "labels": row} for row in rows]


class _Interrupted(Exception):
    pass


def _run(model: Path, case: ResumeCase, folder: Path, resume: bool, stop: int | None) -> list[float]:
    torch.manual_seed(0)
    loaded = load_quantized(model, QuantConfig(case.format))
    # A and B have 4,096 values or more, the least for which bitsandbytes' optimizer keeps 8-bit states.
    add_lora_(loaded, LoraConfig(rank=64, dropout=case.dropout, target_modules=["q_proj", "down_proj"]))
    config = TrainConfig(
        steps=STEPS,
        learning_rate=1e-3,
        warmup_steps=2,
        gradient_accumulation=case.accumulation,
        optimizer=case.optimizer,
        checkpointing=case.checkpointing,
        save_steps=1,
        keep_last=None,
    )
    batches: Any = _Stopping(stop * case.accumulation + 1) if stop is not None else _batches()
    return train(loaded, batches, config, output_dir=folder, resume=resume, progress=False).losses


class _Stopping(list[dict[str, Tensor]]):
    """The same batches, where the one after `count` raises: the run ends there like a killed process."""

    def __init__(self, count: int) -> None:
        super().__init__(_batches())
        self._left = count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in super().__iter__():
            self._left -= 1
            if self._left < 0:
                raise _Interrupted
            yield batch


def unequal(model: Path, scratch: Path, case: ResumeCase) -> list[str]:
    """Returns the differences between the resumed run and the uninterrupted one."""
    whole = _run(model, case, scratch / "whole", False, None)
    try:
        _run(model, case, scratch / "cut", False, case.stop)
    except _Interrupted:
        pass
    else:
        return ["the run was not interrupted"]
    resumed = _run(model, case, scratch / "cut", True, None)
    found = [] if resumed == whole else [f"losses {resumed} and {whole}"]
    last = f"checkpoints/step-{STEPS:06d}"
    for name in ("trained.safetensors", "optimizer.safetensors", "random.safetensors"):
        one, other = (read_safetensors(scratch / run / last / name) for run in ("whole", "cut"))
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            found.append(f"{name} differs")
    return found
