"""Tensors that a checkpoint holds in pieces, joined, or the other way round, read as if they lay there as wanted.

transformers' checkpoint conversion (its core_model_loading.py) stacks, joins, cuts and transposes what it has read
whole. Here the same is said of tensors that are not read yet, so that a model's tensor is a view on pieces in files,
and gives its rows, or one matrix of a stack, without the rest.
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
from qlora_lite.signals import poll

# What a view that has to pass over all of its source, to give a few rows, reads at once.
PASS_BYTES = 16 << 20


class LazyTensor(Protocol):
    """A tensor that is read when its rows are asked for."""

    @property
    def name(self) -> str:
        """What errors call it."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop along the first dimension; all of a tensor that has no dimensions."""

    def select(self, index: int) -> LazyTensor:
        """What lies at this index of the first dimension: a matrix of a stack."""


def read_slices(source: LazyTensor, max_bytes: int, step: int = 1) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) one after the other, of at most so many bytes, each beginning at a multiple of `step`."""
    fake_if_rehearsed = torch.empty(0)
    for part in slices_within(source.shape, source.dtype.itemsize, max_bytes, step, like=fake_if_rehearsed):
        poll()
        yield part.start, source.rows(part.start, part.stop)


def _common_dtype(parts: tuple[LazyTensor, ...]) -> torch.dtype:
    """One that holds the values of all exactly."""
    return functools.reduce(torch.promote_types, (part.dtype for part in parts))


def _check_alike(name: str, parts: tuple[LazyTensor, ...], but: int | None) -> None:
    """CheckpointError unless the shapes are equal, except in dimension `but`."""
    kept = {tuple(size for dim, size in enumerate(part.shape) if dim != but) for part in parts}
    if len(kept) > 1 or (but is not None and any(but >= len(part.shape) for part in parts)):
        shapes = listing((f"{part.name} {part.shape}" for part in parts), 4)
        raise CheckpointError(f"{name} is made of tensors whose shapes do not fit together: {shapes}")


@dataclass(frozen=True)
class Selected:
    """What lies at one index of another's first dimension, for sources without a shorter way to it."""

    source: LazyTensor
    index: int

    @property
    def name(self) -> str:
        return f"{self.source.name}[{self.index}]"

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[1:]

    def rows(self, start: int, stop: int) -> Tensor:
        whole = self.source.rows(self.index, self.index + 1)[0]
        return whole[start:stop] if self.shape else whole

    def select(self, index: int) -> LazyTensor:
        return Selected(self, index)


@dataclass(frozen=True)
class Stacked:
    """Tensors of one shape along a new first dimension. CheckpointError for different shapes."""

    name: str
    parts: tuple[LazyTensor, ...]

    def __post_init__(self) -> None:
        _check_alike(self.name, self.parts, None)

    @property
    def dtype(self) -> torch.dtype:
        return _common_dtype(self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    def rows(self, start: int, stop: int) -> Tensor:
        length = self.shape[1] if len(self.shape) > 1 else 1
        return torch.stack([part.rows(0, length).to(self.dtype) for part in self.parts[start:stop]])

    def select(self, index: int) -> LazyTensor:
        return self.parts[index]


@dataclass(frozen=True)
class Concatenated:
    """Tensors one after the other along a dimension. CheckpointError if they differ in another one."""

    name: str
    parts: tuple[LazyTensor, ...]
    dim: int

    def __post_init__(self) -> None:
        _check_alike(self.name, self.parts, self.dim)

    @property
    def dtype(self) -> torch.dtype:
        return _common_dtype(self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (*first[: self.dim], sum(part.shape[self.dim] for part in self.parts), *first[self.dim + 1 :])

    def rows(self, start: int, stop: int) -> Tensor:
        if self.dim > 0:
            return torch.cat([part.rows(start, stop).to(self.dtype) for part in self.parts], dim=self.dim)
        pieces, begin = [], 0
        for part in self.parts:
            first, last = max(start - begin, 0), min(stop - begin, part.shape[0])
            if first < last:
                pieces.append(part.rows(first, last).to(self.dtype))
            begin += part.shape[0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def select(self, index: int) -> LazyTensor:
        if self.dim > 0:
            return Concatenated(f"{self.name}[{index}]", tuple(part.select(index) for part in self.parts), self.dim - 1)
        for part in self.parts:
            if index < part.shape[0]:
                return part.select(index)
            index -= part.shape[0]
        raise IndexError(index)


@dataclass(frozen=True)
class Narrowed:
    """`length` places of a dimension, from `start` on."""

    name: str
    source: LazyTensor
    dim: int
    start: int
    length: int

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.source.shape[: self.dim], self.length, *self.source.shape[self.dim + 1 :])

    def rows(self, start: int, stop: int) -> Tensor:
        if self.dim == 0:
            return self.source.rows(self.start + start, self.start + stop)
        return self.source.rows(start, stop).narrow(self.dim, self.start, self.length)

    def select(self, index: int) -> LazyTensor:
        if self.dim == 0:
            return self.source.select(self.start + index)
        return Narrowed(f"{self.name}[{index}]", self.source.select(index), self.dim - 1, self.start, self.length)


@dataclass(frozen=True)
class Transposed:
    """Two dimensions exchanged, the first named before the second.

    Where the first dimension of all is one of them, rows are columns of what is read: each slice of them takes a pass
    over the source, `PASS_BYTES` at a time.
    """

    source: LazyTensor
    dim0: int = 0
    dim1: int = 1

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = list(self.source.shape)
        sizes[self.dim0], sizes[self.dim1] = sizes[self.dim1], sizes[self.dim0]
        return tuple(sizes)

    def rows(self, start: int, stop: int) -> Tensor:
        if self.dim0 > 0:
            return self.source.rows(start, stop).transpose(self.dim0, self.dim1)
        pieces = read_slices(self.source, PASS_BYTES)
        return torch.cat([piece.transpose(0, self.dim1)[start:stop].clone() for _, piece in pieces], dim=self.dim1)

    def select(self, index: int) -> LazyTensor:
        if self.dim0 > 0:
            return Transposed(self.source.select(index), self.dim0 - 1, self.dim1 - 1)
        return Selected(self, index)
