"""Tests of packing against a best-fit decreasing that tries every row for every example."""

from __future__ import annotations

import random
import time
import tracemalloc
from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.data.packing import Fill, pack, packed_fill
from qlora_lite.errors import ConfigError


def reference(lengths: list[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing as in the books. Among equal rows the first one is taken, among equal lengths too."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        spaces = [(max_length - sum(lengths[other] for other in row), number) for number, row in enumerate(rows)]
        fitting = [(space, number) for space, number in spaces if space >= lengths[index]]
        if fitting:
            rows[min(fitting)[1]].append(index)
        else:
            rows.append([index])
    return rows


LENGTHS = st.integers(1, 40).flatmap(
    lambda most: st.tuples(st.lists(st.integers(1, most), max_size=80), st.integers(most, 60))
)


@given(LENGTHS)
def test_rows_are_those_of_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths, max_length = case
    rows = pack(lengths, max_length)
    found = [list(row) for row in rows]
    assert found == reference(lengths, max_length)
    assert len(found) == len(rows)
    assert sorted(index for row in found for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= max_length for row in found)


def test_many_rows_of_many_lengths_are_those_of_best_fit_decreasing() -> None:
    generator = random.Random(0)
    lengths = [min(300, max(1, int(generator.lognormvariate(3.5, 1)))) for _ in range(600)]
    assert [list(row) for row in pack(lengths, 300)] == reference(lengths, 300)


def test_every_kind_of_lengths_gives_the_same_rows() -> None:
    lengths = [5, 4, 6, 3, 2, 1, 5]
    wanted = [[2, 3], [0, 1], [6, 4, 5]]
    kinds = [lengths, tuple(lengths), array("i", lengths), torch.tensor(lengths), torch.tensor(lengths).int()[:]]
    for given_lengths in [*kinds, torch.tensor([lengths, lengths]).T[:, 0]]:
        rows = pack(given_lengths, 9)
        assert [list(row) for row in rows] == wanted
    assert [list(row) for row in rows[1:]] == wanted[1:] and list(rows[-1]) == wanted[-1]
    with pytest.raises(IndexError):
        rows[3]
    assert list(pack([], 9)) == []


def test_lengths_that_fit_into_no_row_are_refused() -> None:
    with pytest.raises(ConfigError, match="must hold the longest example; got '9 for 10 tokens'"):
        pack([1, 10], 9)
    with pytest.raises(ConfigError, match="a packed example must have at least one token; got 0"):
        pack([3, 0], 9)


def test_a_row_may_be_longer_than_any_memory() -> None:
    assert [list(row) for row in pack([3, 7], 2**62)] == [[1, 0]]


def test_fill_counts_rows_and_the_share_of_tokens() -> None:
    assert packed_fill([5, 4, 6, 3, 2, 1, 5], 9) == Fill(rows=3, tokens=26, max_length=9)
    assert packed_fill(torch.tensor([5, 4, 6, 3, 2, 1, 5]), 9).share == 26 / 27
    assert packed_fill([], 9) == Fill(0, 0, 9) and packed_fill([], 9).share == 1


def test_time_and_memory_grow_with_the_number_of_examples() -> None:
    """A hundred thousand examples: 0.2 s. Trying every row for each of them would take minutes."""
    generator = random.Random(0)
    lengths = array("q", (generator.randint(1, 2048) for _ in range(100_000)))
    began = time.process_time()
    rows = pack(lengths, 2048)
    assert time.process_time() - began < 5
    assert len(rows) * 2048 < 1.002 * sum(lengths)
    tracemalloc.start()
    pack(lengths, 2048)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * len(lengths)
