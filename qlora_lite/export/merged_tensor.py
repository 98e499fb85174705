"""The tensors of an export as lazy tensors: rows of W0 + scaling * B A, computed and measured when they are read.

The step of a weight on its way out between weight_rows.py and plan.py. checkpoint_names.py makes the tensors of the
checkpoint from those of the model, as views; `view_slices` gives the rows of such a view in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lite.checkpoints.lazy_tensors import Concatenated, Interleaved, LazyTensor, Narrowed, Selected, Transposed
from qlora_lite.compute.slicing import slices_within
from qlora_lite.compute.weight_update import Delta, Replacement, Update
from qlora_lite.export.report import TensorFigures
from qlora_lite.export.weight_rows import WeightRows, merged_rows, whole_slices
from qlora_lite.signals import check_signals

# Computed at once, in fp32; small enough to stay in the caches while it is summed, cast and measured.
SLICE_BYTES = 2 << 20


class MergedTensor:
    """W0 + scaling * B A of one tensor of the model, in the dtype of the export.

    versions: of each matrix of a stack, or of the one weight: W0 that the update is added to, and the other base, if
    the error of packing is to be measured. delta: computes or reads the update. It is called when the first row is
    read, and the update is dropped after the last one; `measured` then gets the figures. Each row has to be read once.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        versions: list[tuple[WeightRows, ...]],
        delta: Callable[[], Update] | None,
        measured: Callable[[TensorFigures], None],
    ) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.is_stack = len(versions[0][0].shape) < len(shape)
        self._versions, self._delta, self._measured = versions, delta, measured
        step = 1 if delta is None else Delta.TILE_ROWS
        self._matrices = [
            MergedMatrix(self, index, math.lcm(step, *(version.step for version in versions[index])))
            for index in range(len(versions))
        ]
        self._update: Update | None = None
        self._matrix_update: tuple[int, Update | None] = (-1, None)
        self._figures: TensorFigures | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        if not self.is_stack:
            return self._matrices[0].rows(start, stop)
        return torch.stack([matrix.rows(0, matrix.shape[0]) for matrix in self._matrices[start:stop]])

    def select(self, index: int) -> LazyTensor:
        return self._matrices[index] if self.is_stack else Selected(self, index)

    def slices(self) -> Iterator[Tensor]:
        """Yields all rows in order; for a stack those of each matrix, one matrix after the other."""
        for matrix in self._matrices:
            yield from view_slices(matrix)

    def _started(self) -> TensorFigures:
        """Returns the figures so far. Before the first row, the update is computed or read."""
        if self._figures is not None:
            return self._figures
        figures = TensorFigures(self.name, values=0)
        update = None if self._delta is None else self._delta()
        if update is not None:
            chosen = [versions[0] for versions in self._versions]
            update = update.prepared(lambda: whole_slices(chosen, update, SLICE_BYTES))
            if not isinstance(update, Replacement) and update.additive:
                figures.update = update.squared_norm()
            else:
                figures.update = 0.0  # summed up slice by slice
        self._update, self._figures = update, figures
        return figures

    def _update_of(self, index: int) -> Update | None:
        if self._matrix_update[0] != index:
            self._matrix_update = index, None if self._update is None else self._update.matrices[index]
        return self._matrix_update[1]

    def merge(self, index: int, first: int, last: int, kept: slice | None) -> Tensor:
        """Returns rows `first` to `last` of one matrix, merged, and adds them to the figures.

        kept: those of these rows that were asked for, None for all. The others are there because the update is added in
        tiles.
        """

        def only_kept(part: Tensor) -> Tensor:
            return part if kept is None else part[kept]

        figures, update = self._started(), self._update_of(index)
        rows, *other = [version.rows(first, last) for version in self._versions[index]]
        base = only_kept(rows)
        figures.values += base.numel()
        figures.add_weight(base)
        if other:
            figures.add_quantization(base, only_kept(other[0]))
        without_update = None if update is None else base.to(self.dtype, copy=True)
        before = None if update is None or update.additive else base.clone()
        merged = merged_rows(rows, first, update, self.dtype, self.name)
        written = base if merged is rows else only_kept(merged)  # the same object if nothing was cast
        if before is not None:
            figures.add_update(before.sub_(base))
        figures.add_written(base, written, without_update)
        if figures.values == math.prod(self.shape):
            self._update, self._matrix_update, self._figures = None, (-1, None), None
            self._measured(figures)
        return written


@dataclass(frozen=True, eq=False)
class MergedMatrix:
    """One matrix of a `MergedTensor` that is a stack, or all of another tensor.

    step: rows that are read from a multiple of it on, and up to one, are computed only once.
    """

    whole: MergedTensor
    index: int
    step: int

    @property
    def name(self) -> str:
        return f"{self.whole.name}[{self.index}]" if self.whole.is_stack else self.whole.name

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape[1:] if self.whole.is_stack else self.whole.shape

    @torch.no_grad()
    def rows(self, start: int, stop: int) -> Tensor:
        check_signals()
        count = self.shape[0] if self.shape else 1
        first, last = start // self.step * self.step, min(-(-stop // self.step) * self.step, count)
        kept = None if (first, last) == (start, stop) else slice(start - first, stop - first)
        return self.whole.merge(self.index, first, last, kept)

    def select(self, index: int) -> LazyTensor:
        return Selected(self, index)


@dataclass(frozen=True, eq=False)
class IntegerTensor:
    """A tensor of integers of the model, which no adapter changes. whole: returns or reads it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    whole: Callable[[], Tensor]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.whole()[start:stop] if self.shape else self.whole()

    def select(self, index: int) -> LazyTensor:
        return Selected(self, index)

    def slices(self) -> Iterator[Tensor]:
        """Yields the tensor."""
        yield self.whole()


# A tensor of the model, as an export computes or reads it.
ExportedTensor = MergedTensor | IntegerTensor


class TransposedOnce:
    """Two dimensions exchanged: `tensor.transpose(dim0, dim1)`, with dim0 < dim1; each value is read once.

    If dim0 is 0, the first read of rows reads the whole tensor. It is held until the last row was read: one matrix, in
    the dtype of the export.
    """

    def __init__(self, tensor: LazyTensor, dim0: int, dim1: int) -> None:
        self.tensor, self.dim0, self.dim1 = tensor, dim0, dim1
        self.name, self.dtype = tensor.name, tensor.dtype
        self.shape = Transposed(tensor, dim0, dim1).shape
        self._held: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        if self.dim0 > 0:
            return self.tensor.rows(start, stop).transpose(self.dim0, self.dim1)
        if self._held is None:
            held, filled = torch.empty(self.tensor.shape, dtype=self.dtype), 0
            for rows in view_slices(self.tensor):
                held.view(-1)[filled : filled + rows.numel()] = rows.reshape(-1)
                filled += rows.numel()
            self._held = held.transpose(0, self.dim1)
        rows = self._held[start:stop]
        if stop == self.shape[0]:
            self._held = None
        return rows

    def select(self, index: int) -> LazyTensor:
        if self.dim0 > 0:
            return TransposedOnce(self.tensor.select(index), self.dim0 - 1, self.dim1 - 1)
        return Selected(self, index)


def _parts(view: LazyTensor) -> tuple[LazyTensor, ...]:
    """Returns the tensors that a view is made of; nothing for another tensor than a view."""
    if isinstance(view, Concatenated):
        return view.tensors
    return (view.tensor,) if isinstance(view, (Narrowed, Selected, TransposedOnce, Interleaved)) else ()


def _step(view: LazyTensor) -> int:
    """Returns the step of the matrices of a view: slices that begin at its multiples are computed only once."""
    if isinstance(view, MergedMatrix):
        return view.step
    # Each row of two halves is read once in pairs.
    return math.lcm(1, *map(_step, _parts(view))) * (2 if isinstance(view, Interleaved) and view.dim == 0 else 1)


def _has_stacks(view: LazyTensor) -> bool:
    return any(map(_has_stacks, _parts(view))) or (isinstance(view, MergedTensor) and view.is_stack)


def view_slices(view: LazyTensor) -> Iterator[Tensor]:
    """Yields all rows of a tensor in order, a slice at a time; for a stack those of each matrix."""
    if isinstance(view, ExportedTensor):
        yield from view.slices()
    elif len(view.shape) > 2 and _has_stacks(view):
        for index in range(view.shape[0]):
            yield from view_slices(view.select(index))
    else:
        # As many rows as make SLICE_BYTES in fp32, whatever the dtype.
        for part in slices_within(view.shape, torch.float32.itemsize, SLICE_BYTES, _step(view)):
            yield view.rows(part.start, part.stop)
