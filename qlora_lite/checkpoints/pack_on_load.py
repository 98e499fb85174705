"""Packs a weight while it is read, a slice at a time.

The step of a weight on its way in between conversion.py, which gives its `LazyTensor`, and load.py. A weight that lies
packed in the file is read by layouts/bitsandbytes_layout.py instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from qlora_lite.checkpoints.lazy_tensors import READ_BYTES, LazyTensor, Narrowed, read_slices
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import row_step
from qlora_lite.quantization.packed_weight import PackedWeight, check_packable


class LazyPackedWeight(Protocol):
    """A weight in a file that a model holds packed; `load` makes it.

    step: a slice of its rows has to start at a multiple of so many rows.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def step(self) -> int: ...

    def load(self, device: torch.device) -> PackedWeight:
        """Reads the weight, and packs it unless it is packed in the file."""


@dataclass(frozen=True)
class PackedOnLoad:
    """A tensor in a file that is packed when it is loaded, after rounding to `dtype`, in which the model is loaded.

    first_row: number of its first row in the tensor that has the name.
    """

    stored: LazyTensor
    config: QuantConfig
    format: str
    dtype: torch.dtype
    first_row: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def step(self) -> int:
        return row_step(self.shape, self.format, self.config.blocksize)

    def _slices(self, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        for first, rows in read_slices(self.stored, READ_BYTES, self.step):
            moved = rows.to(device=device, dtype=self.dtype)
            check_packable(moved, self.stored.name, self.format, self.first_row + first)
            yield first, moved

    def load(self, device: torch.device) -> PackedWeight:
        """Raises QuantizationError, naming the tensor, for values that the format cannot hold."""
        return PackedWeight.from_slices(self.stored.shape, device, self._slices(device), self.config, self.format)

    def empty(self, device: torch.device) -> PackedWeight:
        """Returns a packed weight of this layout that holds zeros."""
        rows, columns = self.shape
        return PackedWeight((rows, columns), self.format, self.config.blocksize, self.config.double_quant, device)

    def load_rows(self, start: int, stop: int, device: torch.device) -> PackedWeight:
        """Reads and packs rows start to stop, multiples of `step` unless stop is the end, to the codes that they have
        in the whole weight. Their absmax is fp32: packing it takes that of all rows.
        """
        rows = Narrowed(self.stored.name, self.stored, 0, start, stop - start)
        config = replace(self.config, double_quant=False)
        return replace(self, stored=rows, config=config, first_row=self.first_row + start).load(device)
