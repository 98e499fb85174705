"""Tensors and packed weights that lie in mapped files: views of the mapping, for which nothing is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_lite.checkpoints.lazy_tensors import LazyTensor
from qlora_lite.checkpoints.safetensors_read import StoredTensor
from qlora_lite.offload import mapped_file
from qlora_lite.offload.mapped_file import MappedFile
from qlora_lite.quantization.formats import row_step
from qlora_lite.quantization.kernels import nested_code
from qlora_lite.quantization.packed_weight import PackedWeight


class MappedFiles:
    """The mapped files of a model, each opened once."""

    def __init__(self) -> None:
        self._files: dict[Path, MappedFile] = {}

    def can_hold(self, stored: StoredTensor) -> bool:
        """Whether a stored tensor is worth mapping, and lies where its dtype can be read."""
        size = math.prod(stored.shape) * stored.dtype.itemsize
        return size >= mapped_file.LEAST_BYTES and stored.begin % stored.dtype.itemsize == 0

    def tensor(self, stored: StoredTensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Returns a stored tensor as one of this dtype and shape, which has the same bytes; mapped if it can be."""
        if not self.can_hold(stored):
            return stored.read().view(-1).view(dtype).view(shape)
        if stored.path not in self._files:
            self._files[stored.path] = MappedFile(stored.path)
        return self._files[stored.path].tensor(stored.begin, shape, dtype)


@dataclass(frozen=True)
class MappedTensor:
    """A plain tensor in a mapped file; `LazyTensor` for those who read it in slices."""

    stored: StoredTensor
    files: MappedFiles

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def rows(self, start: int, stop: int) -> Tensor:
        return self.stored.rows(start, stop)

    def select(self, index: int) -> LazyTensor:
        return self.stored.select(index)

    def mapped(self) -> Tensor:
        """Returns the whole tensor; nothing is read."""
        return self.files.tensor(self.stored, self.dtype, self.shape)


@dataclass(frozen=True)
class MappedPackedWeight:
    """A packed weight whose buffers lie in a file. buffers: by the names of `PackedWeight`'s buffers."""

    shape: tuple[int, ...]
    format: str
    blocksize: int
    double_quant: bool
    buffers: Mapping[str, StoredTensor]
    files: MappedFiles
    nested_offset: float | None = None

    @property
    def step(self) -> int:
        return row_step(self.shape, self.format, self.blocksize)

    def load(self, device: torch.device) -> PackedWeight:
        """Returns the weight; of its large buffers nothing is read."""
        rows, columns = self.shape
        packed = PackedWeight((rows, columns), self.format, self.blocksize, self.double_quant, torch.device("meta"))
        for name, empty in list(packed.named_buffers()):
            if name == "nested_code":  # a constant, which no file has to hold
                value = torch.tensor(nested_code(), dtype=torch.float32)
            elif name == "nested_offset" and self.nested_offset is not None:
                value = torch.tensor(self.nested_offset, dtype=torch.float32)
            else:
                value = self.files.tensor(self.buffers[name], empty.dtype, tuple(empty.shape))
            setattr(packed, name, value)
        return packed
