"""Which examples share a row of at most `max_length` tokens, and how full the rows are.

Best-fit decreasing: the longest example first, each into the row with the least free space that holds it. It needs at
most 11/9 of the fewest possible rows, and a constant (D. S. Johnson, Near-optimal bin packing algorithms, 1973); with
examples that are short next to a row, hardly any token of a row stays empty.
"""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

from torch import Tensor

from qlora_lite.checks import require

INDICES = "q"  # the type code of arrays: 8 bytes for an index, where a list takes 40


class Rows(Sequence[Sequence[int]]):
    """Rows of indices, held in two arrays.

    indices: of all rows, one after the other. ends: where each row ends in them.
    """

    def __init__(self, indices: array[int], ends: array[int]) -> None:
        self._indices, self._ends = indices, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> Sequence[int]: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Sequence[int]]: ...
    def __getitem__(self, row: int | slice) -> Sequence[int] | Sequence[Sequence[int]]:
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        number = range(len(self))[row]
        return self._indices[self._ends[number - 1] if number > 0 else 0 : self._ends[number]]


@dataclass(frozen=True)
class Fill:
    """How full packed rows are. tokens: of the examples, without padding."""

    rows: int
    tokens: int
    max_length: int

    @property
    def share(self) -> float:
        """The tokens of examples, divided by those that the rows hold at most."""
        return self.tokens / (self.rows * self.max_length) if self.rows > 0 else 1.0


def as_array(numbers: Sequence[int] | Tensor) -> array[int]:
    """Returns the integers of a sequence or of a tensor of one dimension on the CPU as an array."""
    # Read through memory, the numbers of a tensor do not become a list first.
    values: Iterable[int] = memoryview(numbers.numpy()) if isinstance(numbers, Tensor) else numbers  # type: ignore[arg-type]
    return array(INDICES, values)


def _longest_first(lengths: array[int]) -> tuple[array[int], array[int]]:
    """Returns the indices by falling length, equal lengths in the given order; and the number of each length."""
    counts = array(INDICES, [0]) * (max(lengths, default=0) + 1)
    for length in lengths:
        counts[length] += 1
    # The place of the next index of a length: behind all longer ones.
    places = array(INDICES, [0, *itertools.accumulate(reversed(counts))][-2::-1])
    order = array(INDICES, [0]) * len(lengths)
    for index, length in enumerate(lengths):
        order[places[length]] = index
        places[length] += 1
    return order, counts


def _rows_of(counts: array[int], max_length: int) -> array[int]:
    """Returns the row of each example, by falling length. counts: the number of examples of each length.

    Among rows with the same free space the first one is taken. Examples of one length follow each other, so the row
    that got one has the least free space for the next one too, until it is full.
    """
    rows = array(INDICES)
    opened = 0
    holding: list[tuple[int, int]] = []  # a heap of (free space, row), for rows that hold an example of this length
    waiting: dict[int, list[int]] = {}  # rows by free space, for shorter examples
    for length in range(len(counts) - 1, 0, -1):
        for row in waiting.pop(length, ()):
            heapq.heappush(holding, (length, row))
        left = counts[length]
        while left > 0:
            if holding:
                space, row = heapq.heappop(holding)
            else:
                space, row = max_length, opened
                opened += 1
            taken = min(left, space // length)
            rows.extend(itertools.repeat(row, taken))
            left -= taken
            space -= taken * length
            if space >= length:
                heapq.heappush(holding, (space, row))
            elif space > 0:
                waiting.setdefault(space, []).append(row)
    return rows


def pack(lengths: Sequence[int] | Tensor, max_length: int) -> Rows:
    """Returns the indices of the examples in each row, packed best-fit decreasing.

    A row has at most `max_length` tokens. Every index occurs once. Examples of equal length take the places in the
    given order. Time grows as n log n, and memory by some 60 bytes for each example.
    Raises ConfigError if an example is longer than `max_length`, or has no token.
    """
    numbers = as_array(lengths)
    longest, shortest = max(numbers, default=1), min(numbers, default=1)
    require(longest <= max_length, "max_length must hold the longest example", f"{max_length} for {longest} tokens")
    require(shortest >= 1, "a packed example must have at least one token", shortest)
    order, counts = _longest_first(numbers)
    rows = _rows_of(counts, max_length)
    sizes = array(INDICES, [0]) * (max(rows, default=-1) + 1)
    for row in rows:
        sizes[row] += 1
    ends = array(INDICES, itertools.accumulate(sizes))
    places = array(INDICES, [0, *ends[:-1]])
    indices = array(INDICES, [0]) * len(numbers)
    for index, row in zip(order, rows, strict=True):
        indices[places[row]] = index
        places[row] += 1
    return Rows(indices, ends)


def packed_fill(lengths: Sequence[int] | Tensor, max_length: int) -> Fill:
    """Returns how full the rows are into which `pack` puts examples of these lengths. Raises what `pack` raises."""
    numbers = as_array(lengths)
    return Fill(len(pack(numbers, max_length)), sum(numbers), max_length)
