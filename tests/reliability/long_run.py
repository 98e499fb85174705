"""Trains a tiny model for many steps, and checks that memory, file handles and tensors do not grow. Part of endure.py.

Resident bytes are sampled before each step. A least-squares line is fitted to the samples after the first quarter of
the run, in which malloc and torch's caches fill. The line counts as flat if its slope is below twice its standard error
or below a page (4,096 bytes) per step: a run keeps some hundred bytes per step for its result, and the smallest tensor
with its storage takes more than that.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from example_model import make_tiny_model
from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train

PAGE = 4096
SETTLED = 1 / 4


@dataclass(frozen=True)
class Soak:
    """The slope and its standard error, in bytes per step. files, tensors: when memory had settled, and at the end."""

    steps: int
    slope: float
    slope_error: float
    files: tuple[int, int]
    tensors: tuple[int, int]

    @property
    def is_flat(self) -> bool:
        return self.slope <= max(2 * self.slope_error, PAGE) and self.files[0] == self.files[1] and not self.leaked

    @property
    def leaked(self) -> int:
        """The number of tensors at the end beyond those when memory had settled."""
        return max(0, self.tensors[1] - self.tensors[0])


def fitted_slope(values: list[int]) -> tuple[float, float]:
    """Returns the slope of the least-squares line through (0, v_0), (1, v_1), ..., and its standard error."""
    count = len(values)
    middle, mean = (count - 1) / 2, sum(values) / count
    spread = sum((step - middle) ** 2 for step in range(count))
    slope = sum((step - middle) * (value - mean) for step, value in enumerate(values)) / spread
    rest = sum((value - mean - slope * (step - middle)) ** 2 for step, value in enumerate(values))
    return slope, math.sqrt(rest / (count - 2) / spread)


def _live_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def soak(folder: Path, steps: int) -> Soak:
    """Trains a tiny NF4 model for `steps` steps, with batches of varying lengths, dropout and metrics on disk."""
    # Older tensors of this process may be freed at any time, which would hide as many leaked ones.
    others = {id(tensor): weakref.ref(tensor) for tensor in _live_tensors()}
    model = load_quantized(make_tiny_model(folder / "model"), QuantConfig())
    add_lora_(model, LoraConfig(rank=4, dropout=0.1))
    process, resident, files, tensors = psutil.Process(), [], [], []
    settled = int(steps * SETTLED)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            resident.append(process.memory_info().rss)
            if step in (settled, steps - 1):
                files.append(process.num_fds())
                tensors.append(
                    sum(not (id(tensor) in others and others[id(tensor)]() is tensor) for tensor in _live_tensors())
                )
            length = int(torch.randint(8, 48, (), generator=generator))
            ids = torch.randint(5, 100, (2, length), generator=generator)
            yield {"input_ids": ids, "labels": ids}

    train(model, batches(), TrainConfig(steps=steps), output_dir=folder / "run", progress=False)
    slope, error = fitted_slope(resident[settled:])
    return Soak(steps, slope, error, (files[0], files[1]), (tensors[0], tensors[1]))
