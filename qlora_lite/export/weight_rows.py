"""A weight as something that gives its rows in fp32, a slice at a time, wherever it is: in memory, packed, or on disk.

What is written is computed from these alone, so a model in memory and a checkpoint on disk are exported by one path.
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
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.signals import check_signals


class WeightRows(Protocol):
    """Rows of a weight in fp32. `step`: a slice begins at a multiple of it."""

    @property
    def step(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, a new tensor."""


class DenseRows:
    """Of a tensor in memory."""

    step = 1

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self._tensor = tuple(tensor.shape), tensor.detach()

    def rows(self, start: int, stop: int) -> Tensor:
        part = self._tensor[start:stop] if self.shape else self._tensor
        # A kernel may lie with its channels last; its rows must be ones that can be seen as those of a matrix.
        return part.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


class PackedRows:
    """Of a packed weight."""

    def __init__(self, packed: PackedWeight) -> None:
        self.shape, self.step, self._packed = tuple(packed.shape), packed.row_step, packed

    def rows(self, start: int, stop: int) -> Tensor:
        return self._packed.dequantize_rows(start, stop, torch.float32)


class TransposedRows:
    """Of a weight that was packed the other way round: columns of it, for which all of it is unpacked by slices."""

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
    """Rows in the orientation of the plain checkpoint; `transposed`: the weight was turned round to be packed."""
    return TransposedRows(packed) if transposed else PackedRows(packed)


@dataclass(frozen=True)
class StoredRows:
    """Of a tensor in a file; rounded to `through` first, if given: what a model holds that was loaded in that dtype."""

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
    """Of a tensor in a file as they are once it is packed: packed when first asked for, dropped after the last row.

    transposed: `source` is turned round to be packed, and the rows are those of the plain checkpoint.
    """

    def __init__(self, source: LazyPackedWeight, transposed: bool = False) -> None:
        rows, columns = source.shape
        self.shape = (columns, rows) if transposed else (rows, columns)
        self.step = 1 if transposed else source.step
        self._source, self._transposed = source, transposed
        self._rows: PackedRows | TransposedRows | None = None
        self._begun: Future[PackedRows | TransposedRows] | None = None
        # What begins to pack the weights that come after this one.
        self.then: Callable[[], None] = _nothing

    def rows(self, start: int, stop: int) -> Tensor:
        if self._rows is None:
            self._rows = self._packed() if self._begun is None else self._begun.result()
            self._begun = None
            self.then()
        part = self._rows.rows(start, stop)
        if stop == self.shape[0]:
            self._rows = None
        return part

    def begin(self, pool: Executor) -> None:
        """Has it packed in another thread; the first rows wait for that, and raise what went wrong with it."""
        if self._rows is None and self._begun is None:
            self._begun = pool.submit(self._packed)

    def forget(self) -> None:
        """Drops what was begun, and begins nothing any more."""
        self._begun, self.then = None, _nothing

    def _packed(self) -> PackedRows | TransposedRows:
        return packed_rows(self._source.load(torch.device("cpu")), self._transposed)


def _nothing() -> None:
    pass


@contextmanager
def packing_ahead(weights: Sequence[RepackedRows]) -> Iterator[None]:
    """Within the block each of these is packed in a thread of its own while the one before it gives its rows.

    torch's threads are shared out between the two: much of packing is done by one of them however many there are. At
    the end, whatever happens, the thread is waited for; what it had begun is dropped.
    """
    threads = torch.get_num_threads()
    share = max(1, threads // 2)
    pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(share,))
    for weight, following in itertools.pairwise(weights):
        weight.then = functools.partial(following.begin, pool)
    torch.set_num_threads(share)
    try:
        yield
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        for weight in weights:
            weight.forget()


def aligned_slices(
    matrices: Iterable[tuple[WeightRows, ...]], update: Update | None, largest_bytes: int
) -> Iterator[tuple[int, list[Tensor], Update | None]]:
    """(first row of its matrix, the rows in each form, the matrix's update) of a weight's slices.

    They begin where every form and the update allow it. matrices: each as one or several forms of it; one matrix, or
    those of a stack.
    """
    pieces = list(matrices)
    deltas = [None] * len(pieces) if update is None else update.matrices
    for forms, delta in zip(pieces, deltas, strict=True):
        step = math.lcm(*(form.step for form in forms), 1 if delta is None else Delta.TILE_ROWS)
        for part in slices_within(forms[0].shape, torch.float32.itemsize, largest_bytes, step):
            check_signals()
            yield part.start, [form.rows(part.start, part.stop) for form in forms], delta


def whole_slices(
    matrices: Iterable[WeightRows], update: Update | None, largest_bytes: int
) -> Iterator[tuple[int, Tensor]]:
    """`aligned_slices` of one form: (first row, rows)."""
    for start, (rows,), _ in aligned_slices(zip(matrices), update, largest_bytes):
        yield start, rows


def merged_rows(rows: Tensor, first: int, delta: Update | None, dtype: torch.dtype, name: str) -> Tensor:
    """W0 + scaling * B A of some rows from `first` on, as it is written; `rows` (W0, fp32) become the sum."""
    if delta is not None:
        delta.add_to_(rows, first)
    return cast_finite(rows, dtype, name)


@dataclass(frozen=True)
class MergeInputs:
    """What a tensor can be made of: W0 as trained on, W0 of the checkpoint if it is at hand, the update.

    W0 comes in one piece, or as the matrices of a stack, one after the other. The update is made, or read, when it is
    needed; low_rank: it can be applied apart from W0. Slices take at most `largest_bytes` in fp32.
    """

    name: str
    trained: list[WeightRows]
    original: list[WeightRows] | None
    delta: Callable[[], Update] | None
    low_rank: bool = True

    def base(self, largest_bytes: int) -> Iterator[Tensor]:
        """W0 as trained on, in fp32."""
        return self._slices(self.trained, None, torch.float32, largest_bytes)

    def merged(self, from_original: bool, dtype: torch.dtype, largest_bytes: int) -> Iterator[Tensor]:
        """W0 + scaling * B A as it would be written. CheckpointError if it is the original that is not at hand."""
        chosen = self.original if from_original else self.trained
        if chosen is None:
            raise CheckpointError(f"the checkpoint's own {self.name} is not at hand")
        return self._slices(chosen, self.delta, dtype, largest_bytes)

    @torch.no_grad()
    def _slices(
        self, pieces: list[WeightRows], make: Callable[[], Update] | None, dtype: torch.dtype, largest_bytes: int
    ) -> Iterator[Tensor]:
        update = None if make is None else make()
        if update is not None:
            update = update.prepared(lambda: whole_slices(pieces, update, largest_bytes))
        for start, (rows,), delta in aligned_slices(zip(pieces), update, largest_bytes):
            yield merged_rows(rows, start, delta, dtype, self.name)
