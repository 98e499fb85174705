"""Lazy tensors: stacked, joined, narrowed, transposed and interleaved views of tensors in files, read in slices.

The second step of a weight on its way in: it takes `StoredTensor`s (safetensors_read.py), and conversion.py builds a
model's tensors from it.

transformers' checkpoint conversion (its core_model_loading.py) applies the same operations to tensors that were read
whole. A view reads only the rows, or the matrix of a stack, that are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qlora_lite.compute.slicing import slices_within
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.signals import check_signals

# Read at once of a tensor that is converted, packed or compared slice by slice.
READ_BYTES = 4 << 20
# Read at once by a view that has to pass over a whole tensor to give a few rows.
PASS_BYTES = 16 << 20


class LazyTensor(Protocol):
    """A tensor whose values are read when its rows are asked for."""

    @property
    def name(self) -> str:
        """The name that errors give."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Reads rows `start` to `stop` of the first dimension; the whole tensor if it has no dimensions."""

    def select(self, index: int) -> LazyTensor:
        """Returns the tensor at this index of the first dimension, as `torch.select` does, without reading it."""


def read_slices(tensor: LazyTensor, max_bytes: int, step: int = 1) -> Iterator[tuple[int, Tensor]]:
    """Yields (first row, rows) of at most `max_bytes` each; a slice starts at a multiple of `step`."""
    fake_if_rehearsed = torch.empty(0)  # fake within a FakeTensorMode
    for part in slices_within(tensor.shape, tensor.dtype.itemsize, max_bytes, step, like=fake_if_rehearsed):
        check_signals()
        yield part.start, tensor.rows(part.start, part.stop)


def _common_dtype(tensors: tuple[LazyTensor, ...]) -> torch.dtype:
    """Returns the dtype to which torch promotes all of them, which holds their values exactly."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _check_shapes(name: str, tensors: tuple[LazyTensor, ...], free_dim: int | None) -> None:
    """Raises CheckpointError unless the shapes are equal in all dimensions but `free_dim`."""
    fixed = {tuple(size for dim, size in enumerate(tensor.shape) if dim != free_dim) for tensor in tensors}
    if len(fixed) > 1 or (free_dim is not None and any(free_dim >= len(tensor.shape) for tensor in tensors)):
        shapes = listing((f"{tensor.name} {tensor.shape}" for tensor in tensors), 4)
        raise CheckpointError(f"{name} is made of tensors whose shapes do not fit together: {shapes}")


@dataclass(frozen=True)
class ShapeOnlyTensor:
    """A tensor that lies in no file. Its rows can be read, with uninitialized memory in them."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        return torch.empty((stop - start, *self.shape[1:]) if self.shape else (), dtype=self.dtype)

    def select(self, index: int) -> ShapeOnlyTensor:
        return ShapeOnlyTensor(f"{self.name}[{index}]", self.dtype, self.shape[1:])


@dataclass(frozen=True)
class Selected:
    """The tensor at one index of the first dimension: torch's `tensor.select(0, index)`.

    For tensors that have no cheaper way to it than reading a row.
    """

    tensor: LazyTensor
    index: int

    @property
    def name(self) -> str:
        return f"{self.tensor.name}[{self.index}]"

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[1:]

    def rows(self, start: int, stop: int) -> Tensor:
        whole = self.tensor.rows(self.index, self.index + 1)[0]
        return whole[start:stop] if self.shape else whole

    def select(self, index: int) -> LazyTensor:
        return Selected(self, index)


@dataclass(frozen=True)
class Stacked:
    """Tensors along a new first dimension: `torch.stack(tensors)`. Raises CheckpointError for different shapes."""

    name: str
    tensors: tuple[LazyTensor, ...]

    def __post_init__(self) -> None:
        _check_shapes(self.name, self.tensors, None)

    @property
    def dtype(self) -> torch.dtype:
        return _common_dtype(self.tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.tensors), *self.tensors[0].shape)

    def rows(self, start: int, stop: int) -> Tensor:
        length = self.shape[1] if len(self.shape) > 1 else 1
        return torch.stack([tensor.rows(0, length).to(self.dtype) for tensor in self.tensors[start:stop]])

    def select(self, index: int) -> LazyTensor:
        return self.tensors[index]


@dataclass(frozen=True)
class Concatenated:
    """Tensors along an existing dimension: `torch.cat(tensors, dim)`.

    Raises CheckpointError if their shapes differ in another dimension.
    """

    name: str
    tensors: tuple[LazyTensor, ...]
    dim: int

    def __post_init__(self) -> None:
        _check_shapes(self.name, self.tensors, self.dim)

    @property
    def dtype(self) -> torch.dtype:
        return _common_dtype(self.tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.tensors[0].shape
        return (*first[: self.dim], sum(tensor.shape[self.dim] for tensor in self.tensors), *first[self.dim + 1 :])

    def rows(self, start: int, stop: int) -> Tensor:
        if self.dim > 0:
            return torch.cat([tensor.rows(start, stop).to(self.dtype) for tensor in self.tensors], dim=self.dim)
        pieces, begin = [], 0
        for tensor in self.tensors:
            first, last = max(start - begin, 0), min(stop - begin, tensor.shape[0])
            if first < last:
                pieces.append(tensor.rows(first, last).to(self.dtype))
            begin += tensor.shape[0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def select(self, index: int) -> LazyTensor:
        if self.dim > 0:
            selected = tuple(tensor.select(index) for tensor in self.tensors)
            return Concatenated(f"{self.name}[{index}]", selected, self.dim - 1)
        for tensor in self.tensors:
            if index < tensor.shape[0]:
                return tensor.select(index)
            index -= tensor.shape[0]
        raise IndexError(index)


@dataclass(frozen=True)
class Narrowed:
    """A range of one dimension: `tensor.narrow(dim, start, length)`."""

    name: str
    tensor: LazyTensor
    dim: int
    start: int
    length: int

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.tensor.shape[: self.dim], self.length, *self.tensor.shape[self.dim + 1 :])

    def rows(self, start: int, stop: int) -> Tensor:
        if self.dim == 0:
            return self.tensor.rows(self.start + start, self.start + stop)
        return self.tensor.rows(start, stop).narrow(self.dim, self.start, self.length)

    def select(self, index: int) -> LazyTensor:
        if self.dim == 0:
            return self.tensor.select(self.start + index)
        return Narrowed(f"{self.name}[{index}]", self.tensor.select(index), self.dim - 1, self.start, self.length)


@dataclass(frozen=True)
class Transposed:
    """Two dimensions exchanged: `tensor.transpose(dim0, dim1)`, with dim0 < dim1.

    If dim0 is 0, each call of `rows` passes over the whole tensor, `PASS_BYTES` at a time.
    """

    tensor: LazyTensor
    dim0: int = 0
    dim1: int = 1

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = list(self.tensor.shape)
        sizes[self.dim0], sizes[self.dim1] = sizes[self.dim1], sizes[self.dim0]
        return tuple(sizes)

    def rows(self, start: int, stop: int) -> Tensor:
        if self.dim0 > 0:
            return self.tensor.rows(start, stop).transpose(self.dim0, self.dim1)
        pieces = read_slices(self.tensor, PASS_BYTES)
        return torch.cat([piece.transpose(0, self.dim1)[start:stop].clone() for _, piece in pieces], dim=self.dim1)

    def select(self, index: int) -> LazyTensor:
        if self.dim0 > 0:
            return Transposed(self.tensor.select(index), self.dim0 - 1, self.dim1 - 1)
        return Selected(self, index)


def transposed(tensor: LazyTensor) -> LazyTensor:
    """Returns a matrix with its dimensions exchanged; of one that is a transposed matrix itself, that matrix."""
    return tensor.tensor if isinstance(tensor, Transposed) and len(tensor.shape) == 2 else Transposed(tensor)


@dataclass(frozen=True)
class Interleaved:
    """One dimension in another order: its even places, and after them the odd ones.

    That is `tensor.unflatten(dim, (n // 2, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)` for an even size n.
    inverse: from two halves, places by turns from each.
    """

    tensor: LazyTensor
    dim: int
    inverse: bool = False

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def rows(self, start: int, stop: int) -> Tensor:
        if self.dim > 0:
            halves = (2, -1) if self.inverse else (-1, 2)
            split: Tensor = self.tensor.rows(start, stop).unflatten(self.dim, halves)
            return split.transpose(self.dim, self.dim + 1).flatten(self.dim, self.dim + 1)
        half = self.shape[0] // 2
        if self.inverse:
            first, last = start // 2, (stop + 1) // 2
            by_turns = [self.tensor.rows(place + first, place + last) for place in (0, half)]
            return torch.stack(by_turns, 1).flatten(0, 1)[start - 2 * first : stop - 2 * first]
        pieces = []
        for place in (0, 1):
            first, last = max(start - place * half, 0), min(stop - place * half, half)
            if first < last:
                pieces.append(self.tensor.rows(2 * first, 2 * last)[place::2])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def select(self, index: int) -> LazyTensor:
        if self.dim > 0:
            return Interleaved(self.tensor.select(index), self.dim - 1, self.inverse)
        half = self.shape[0] // 2
        place, other = (index % 2, index // 2) if self.inverse else (index % half, index // half)
        return self.tensor.select(place * half + other if self.inverse else 2 * place + other)
