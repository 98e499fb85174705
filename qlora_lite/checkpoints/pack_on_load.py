"""A weight as something that gives its rows in fp32, a slice at a time, wherever it is: in memory, packed, or on disk.

What is written is computed from these alone, so a model in memory and a checkpoint on disk are exported by one path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qlora_lite.checkpoints.lazy_tensors import LazyTensor, read_slices
from qlora_lite.checks import check_packable
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import row_step
from qlora_lite.quantization.packed_weight import PackedWeight

# Of a tensor on its way to be packed: so much is read at once.
READ_BYTES = 4 << 20


class LazyPackedWeight(Protocol):
    """A weight in a file that a model holds packed. `step`: a slice of its rows begins at a multiple of it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def step(self) -> int: ...

    def load(self, device: torch.device) -> PackedWeight:
        """The packed weight that loading makes of it."""


@dataclass(frozen=True)
class PackedOnLoad:
    """How a tensor in a file is packed when it is loaded: from slices, rounded to the dtype that it is loaded in."""

    stored: LazyTensor
    config: QuantConfig
    format: str
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def step(self) -> int:
        return row_step(self.shape, self.format, self.config.blocksize)

    def slices(self, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        for first, rows in read_slices(self.stored, READ_BYTES, self.step):
            moved = rows.to(device=device, dtype=self.dtype)
            check_packable(moved, self.stored.name, self.format, first)
            yield first, moved

    def load(self, device: torch.device) -> PackedWeight:
        """QuantizationError, naming the tensor, for values that the format cannot hold."""
        return PackedWeight.from_slices(self.stored.shape, device, self.slices(device), self.config, self.format)
