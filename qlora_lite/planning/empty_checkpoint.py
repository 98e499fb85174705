"""A checkpoint of which nothing but a config is at hand: its tensors have shapes, and rows that nobody has written.

A model that is filled from it on fake tensors (memory/rehearse.py) is packed and placed by the code that does it for a
real one. Packing makes the same temporaries for weights of one shape and format, so it is run for the last of each,
when the most is resident; the others are laid out without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints import conversion
from qlora_lite.checkpoints.checkpoint import Checkpoint
from qlora_lite.checkpoints.conversion import converted_tensors
from qlora_lite.checkpoints.lazy_tensors import LazyTensor
from qlora_lite.checkpoints.pack_on_load import LazyPackedWeight
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import row_step
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.quantization.quantize_model import Slot


@dataclass(frozen=True)
class UnreadTensor:
    """A tensor of which rows can be had, with whatever lies in fresh memory in them."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        return torch.empty((stop - start, *self.shape[1:]) if self.shape else (), dtype=self.dtype)

    def select(self, index: int) -> UnreadTensor:
        return UnreadTensor(f"{self.name}[{index}]", self.dtype, self.shape[1:])


@dataclass(frozen=True)
class LaidOut:
    """A weight that is to be packed, as the buffers that it will have; `step` as of what is packed."""

    shape: tuple[int, ...]
    format: str
    config: QuantConfig

    @property
    def step(self) -> int:
        return row_step(self.shape, self.format, self.config.blocksize)

    def load(self, device: torch.device) -> PackedWeight:
        rows, columns = self.shape
        return PackedWeight((rows, columns), self.format, self.config.blocksize, self.config.double_quant, device)


def _unread(name: str, tensor: Tensor, dtype: torch.dtype) -> UnreadTensor:
    return UnreadTensor(name, dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))


class UnreadCheckpoint:
    """Stands for the checkpoint of a model on meta whose tensors are `dtype` on disk; of tied ones it has the first."""

    def __init__(self, model: Any, config: QuantConfig, dtype: torch.dtype) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tied = architecture.tied_names(model)
        files = {name: _unread(name, tensor, dtype) for name, tensor in conversion.tensors_as_saved(model).items()}
        # Views as on a real one, and in the order of reading: what is resident by when decides on the peak.
        made = converted_tensors(model, shapes, files).tensors
        self.config = config
        self.tensors: Mapping[str, LazyTensor] = {name: made[name] for name in made if name not in tied}
        self._whole = Checkpoint(Path(), config, self.tensors)
        self._run: set[int] = set()

    def plain(self, name: str) -> LazyTensor:
        return self._whole.plain(name)

    def packed_weights(self, name: str, slot: Slot, dtype: torch.dtype) -> list[LazyPackedWeight]:
        """Those that a checkpoint has, or what is left of them when they are packed."""
        found = self._whole.packed_weights(name, slot, dtype)
        return found if id(slot) in self._run else [LaidOut(source.shape, slot.format, self.config) for source in found]

    def slots(self, model: nn.Module) -> list[Slot]:
        """What is packed of the model."""
        found = self._whole.slots(model)
        place = {name: number for number, name in enumerate(self.tensors)}
        in_order = sorted(found, key=lambda slot: place.get(slot.name, 0))
        self._run = {id(slot) for slot in {(slot.weight.shape, slot.format): slot for slot in in_order}.values()}
        return found
