"""Rows of a weight in fp32, a slice at a time, from a dense, packed or stored tensor.

The first step of a weight on its way out: plan.py computes every exported tensor from `WeightRows`, so models in memory
and checkpoints on disk are exported by the same code.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qlora_lite.checkpoints.lazy_tensors import READ_BYTES, LazyTensor
from qlora_lite.checkpoints.pack_on_load import LazyPackedWeight
from qlora_lite.checks import cast_finite
from qlora_lite.compute.slicing import slices_within
from qlora_lite.compute.weight_update import Delta, Update
from qlora_lite.errors import CheckpointError
from qlora_lite.offload.mapped_file import release
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.signals import check_signals


class WeightRows(Protocol):
    """A weight whose rows are read in fp32. step: a slice of rows has to start at a multiple of it."""

    @property
    def step(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns rows `start` to `stop` as a new tensor."""


class DenseRows:
    """Rows of a dense tensor in memory."""

    step = 1

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self._tensor = tuple(tensor.shape), tensor.detach()

    def rows(self, start: int, stop: int) -> Tensor:
        part = self._tensor[start:stop] if self.shape else self._tensor
        # A convolution's kernel may be stored channels last; its rows have to be viewable as those of a matrix.
        rows = part.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not self.shape or stop == self.shape[0]:
            release(self._tensor)
        return rows


class PackedRows:
    """Rows of a packed weight."""

    def __init__(self, packed: PackedWeight) -> None:
        self.shape, self.step, self._packed = tuple(packed.shape), packed.row_step, packed

    def rows(self, start: int, stop: int) -> Tensor:
        part = self._packed.dequantize_rows(start, stop, torch.float32)
        if stop == self.shape[0]:
            release(*self._packed.buffers())
        return part


class TransposedRows:
    """Rows of a weight that was packed transposed, which are columns of it; each read unpacks all of it in slices."""

    step = 1

    def __init__(self, packed: PackedWeight) -> None:
        self.shape, self._packed = (packed.shape[1], packed.shape[0]), packed

    def rows(self, start: int, stop: int) -> Tensor:
        columns = torch.empty((stop - start, self.shape[1]), device=self._packed.device)
        packed = self._packed
        for part in slices_within(packed.shape, torch.float32.itemsize, READ_BYTES, packed.row_step):
            check_signals()
            columns[:, part] = packed.dequantize_rows(part.start, part.stop, torch.float32)[:, start:stop].T
        return columns


def packed_rows(packed: PackedWeight, transposed: bool) -> PackedRows | TransposedRows:
    """Returns the rows of a packed weight as the plain checkpoint has them. transposed: it was packed transposed."""
    return TransposedRows(packed) if transposed else PackedRows(packed)


@dataclass(frozen=True)
class StoredRows:
    """Rows of a tensor in a file; rounded to the dtype `through` first, if given, as a model loaded in it has them."""

    stored: LazyTensor
    through: torch.dtype | None = None
    step = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def rows(self, start: int, stop: int) -> Tensor:
        part = self.stored.rows(start, stop)
        return part.to(self.through or part.dtype).to(torch.float32)


class RepackedRows:
    """Rows of a tensor in a file after packing: packed on the first read, freed after the last row.

    transposed: the weight is transposed to be packed, and the rows are those of the plain checkpoint.
    """

    def __init__(self, weight: LazyPackedWeight, transposed: bool = False) -> None:
        rows, columns = weight.shape
        self.shape = (columns, rows) if transposed else (rows, columns)
        self.step = 1 if transposed else weight.step
        self._weight, self._transposed = weight, transposed
        self._rows: PackedRows | TransposedRows | None = None
        self._started: Future[PackedRows | TransposedRows] | None = None
        # Called on the first read; starts to pack the next weight (`packing_ahead`).
        self.on_first_read: Callable[[], None] = _nothing

    def rows(self, start: int, stop: int) -> Tensor:
        if self._rows is None:
            self._rows = self._packed() if self._started is None else self._started.result()
            self._started = None
            self.on_first_read()
        part = self._rows.rows(start, stop)
        if stop == self.shape[0]:
            self._rows = None
        return part

    def start_packing(self, pool: Executor) -> None:
        """Packs the weight in another thread. The first read waits for it, and raises its error."""
        if self._rows is None and self._started is None:
            self._started = pool.submit(self._packed)

    def cancel(self) -> None:
        """Drops a packed weight that was not read, and starts no other."""
        self._started, self.on_first_read = None, _nothing

    def _packed(self) -> PackedRows | TransposedRows:
        return packed_rows(self._weight.load(torch.device("cpu")), self._transposed)


def _nothing() -> None:
    pass


@contextmanager
def packing_ahead(weights: Sequence[RepackedRows]) -> Iterator[None]:
    """Within the block, packs each weight in a second thread while the rows of the one before it are read.

    torch's threads are divided between the two, because one thread does most of the packing however many there are. At
    the end of the block the second thread is joined, and a packed weight that was not read is dropped.
    """
    threads = torch.get_num_threads()
    share = max(1, threads // 2)
    pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(share,))
    for weight, following in itertools.pairwise(weights):
        weight.on_first_read = functools.partial(following.start_packing, pool)
    torch.set_num_threads(share)
    try:
        yield
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        for weight in weights:
            weight.cancel()


def aligned_slices(
    matrices: Iterable[tuple[WeightRows, ...]], update: Update | None, max_bytes: int
) -> Iterator[tuple[int, list[Tensor], Update | None]]:
    """Reads several versions of a weight slice by slice; yields (first row, rows of each version, update).

    matrices: the matrices of a stack, or the one matrix of a weight, each as a tuple of its versions (trained,
    original). First row and update are those of the matrix. A slice starts where all versions and the update allow it.
    """
    weights = list(matrices)
    deltas = [None] * len(weights) if update is None else update.matrices
    for versions, delta in zip(weights, deltas, strict=True):
        step = math.lcm(*(version.step for version in versions), 1 if delta is None else Delta.TILE_ROWS)
        for part in slices_within(versions[0].shape, torch.float32.itemsize, max_bytes, step):
            check_signals()
            yield part.start, [version.rows(part.start, part.stop) for version in versions], delta


def whole_slices(matrices: Iterable[WeightRows], update: Update | None, max_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """Reads one version of a weight slice by slice; yields (first row, rows)."""
    for start, (rows,), _ in aligned_slices(zip(matrices), update, max_bytes):
        yield start, rows


def merged_rows(rows: Tensor, first: int, delta: Update | None, dtype: torch.dtype, name: str) -> Tensor:
    """Returns rows of W0 + scaling * B A in `dtype`, from row `first` on; changes `rows` (W0, fp32) into the sum.

    Raises QuantizationError, naming the weight, for values above the range of `dtype`.
    """
    if delta is not None:
        delta.add_to_(rows, first)
    return cast_finite(rows, dtype, name)


@dataclass(frozen=True)
class MergeInputs:
    """The inputs of a merged weight: W0 as it was trained on, W0 of the checkpoint if it has one, and the update.

    W0 is one matrix, or the matrices of a stack. delta: computes or reads the update when it is needed. low_rank:
    whether the update can be applied to activations without adding it to W0. Slices take at most `max_bytes` in fp32.
    """

    name: str
    trained: list[WeightRows]
    original: list[WeightRows] | None
    delta: Callable[[], Update] | None
    low_rank: bool = True

    def base(self, max_bytes: int) -> Iterator[Tensor]:
        """Yields rows of W0 as it was trained on, in fp32."""
        return self._slices(self.trained, None, torch.float32, max_bytes)

    def merged(self, from_original: bool, dtype: torch.dtype, max_bytes: int) -> Iterator[Tensor]:
        """Yields rows of W0 + scaling * B A in `dtype`. Raises CheckpointError if the original W0 is missing."""
        chosen = self.original if from_original else self.trained
        if chosen is None:
            raise CheckpointError(f"the checkpoint has no {self.name} in full precision")
        return self._slices(chosen, self.delta, dtype, max_bytes)

    @torch.no_grad()
    def _slices(
        self, matrices: list[WeightRows], make: Callable[[], Update] | None, dtype: torch.dtype, max_bytes: int
    ) -> Iterator[Tensor]:
        update = None if make is None else make()
        if update is not None:
            update = update.prepared(lambda: whole_slices(matrices, update, max_bytes))
        for start, (rows,), delta in aligned_slices(zip(matrices), update, max_bytes):
            yield merged_rows(rows, start, delta, dtype, self.name)
