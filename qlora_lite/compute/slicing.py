"""Cuts the rows of a tensor into slices, so that what is computed from a slice stays small.

`rows_that_fit` gives the number of rows of a slice, `row_slices` the slices that cover all rows, and `slices_within`
both for a tensor of a given shape.

Fake tensors (planning/rehearsal.py) are only allocated, never computed, and slices of one size allocate the same. For
fake tensors `row_slices` therefore gives only the first two and the last two slices: rehearsing a long batch takes no
longer than rehearsing a short one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# At each end: the second slice meets what the first one left allocated, and the last one may be shorter.
FAKE_SLICES = 2


def rows_that_fit(budget: int, row_size: int, step: int = 1) -> int:
    """The largest multiple of `step` rows that fits into `budget`, and at least one step.

    budget, row_size: in the same unit, bytes or values.
    """
    return max(step, budget // max(1, row_size) // step * step)


def row_slices(rows: int, count: int, like: Tensor | None = None) -> Iterator[slice]:
    """Slices of `count` rows that cover `rows`, in order; the last one may be shorter.

    like: if this tensor is fake, only the slices at both ends are given. Pass it only from a loop in which each turn
    frees what it made, or writes it into memory that was allocated before.
    """
    starts: Sequence[int] = range(0, rows, count)
    if isinstance(like, FakeTensor) and len(starts) > 2 * FAKE_SLICES:
        starts = [*starts[:FAKE_SLICES], *starts[-FAKE_SLICES:]]
    for start in starts:
        yield slice(start, min(start + count, rows))


def fill_skipped_(results: list[Tensor], part: slice) -> None:
    """Adds the memory of the results before a slice that were skipped for fake tensors, where results are joined."""
    if results and (skipped := part.start - sum(map(len, results))):
        results.append(results[0].new_empty((skipped, *results[0].shape[1:])))


def joined(results: list[Tensor]) -> Tensor:
    """Returns the results of slices as one tensor."""
    return results[0] if len(results) == 1 else torch.cat(results)


def slices_within(
    shape: Sequence[int], itemsize: int, max_bytes: int, step: int = 1, like: Tensor | None = None
) -> Iterator[slice]:
    """Slices along the first dimension of at most `max_bytes` each, but at least `step` rows.

    Each slice starts at a multiple of `step`. A tensor without dimensions has one row. like: as in `row_slices`.
    """
    if not shape:
        return iter((slice(0, 1),))
    return row_slices(shape[0], rows_that_fit(max_bytes, math.prod(shape[1:]) * itemsize, step), like)


def rows_in(tensor: Tensor, part: slice) -> Tensor:
    """Returns the rows of a slice: the tensor itself, without a call of torch, if the slice has all of them."""
    return tensor if part.stop - part.start == tensor.shape[0] else tensor[part]


def regrouped_rows(slices: Iterable[tuple[int, Tensor]], count: int) -> Iterator[tuple[int, Tensor]]:
    """The rows of `slices`, pairs of (first row, rows), in slices of exactly `count` rows; the last may be shorter."""
    first, waiting = 0, torch.empty(0)
    for _, rows in slices:
        waiting = torch.cat((waiting, rows)) if waiting.numel() else rows
        while waiting.shape[0] >= count:
            yield first, waiting[:count]
            first, waiting = first + count, waiting[count:]
    if waiting.numel():
        yield first, waiting
