"""Tests of slicing: all slices of real tensors, the first and last of fake ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_lite.compute.cross_entropy import linear_cross_entropy
from qlora_lite.compute.slicing import fill_skipped_, joined, regrouped_rows, row_slices, rows_that_fit, slices_within
from qlora_lite.memory.trace import StorageTrace


@given(st.integers(0, 60), st.integers(1, 9))
def test_real_rows_are_covered_once(rows: int, size: int) -> None:
    found = [row for part in row_slices(rows, size) for row in range(rows)[part]]
    assert found == list(range(rows))


@given(rows=st.integers(1, 50), columns=st.integers(1, 9), step=st.integers(1, 8), largest=st.integers(1, 400))
def test_slices_within_a_size_cover_all_rows_once(rows: int, columns: int, step: int, largest: int) -> None:
    parts = list(slices_within((rows, columns), 4, largest, step))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    assert all(part.start % step == 0 for part in parts)
    assert all((p.stop - p.start) * columns * 4 <= largest or p.stop - p.start <= step for p in parts)


def test_as_many_steps_of_rows_are_taken_as_fit() -> None:
    assert rows_that_fit(100, 7) == 14
    assert rows_that_fit(100, 7, step=4) == 12
    assert rows_that_fit(3, 7) == 1 and rows_that_fit(3, 7, step=4) == 4
    assert rows_that_fit(100, 0) == 100  # rows without values
    assert list(slices_within((), 4, 1)) == [slice(0, 1)]


def test_of_many_fake_slices_those_at_the_ends_are_left() -> None:
    with FakeTensorMode():
        fake = torch.empty(0)
    assert list(row_slices(23, 3, fake)) == [slice(0, 3), slice(3, 6), slice(18, 21), slice(21, 23)]
    assert list(row_slices(12, 3, fake)) == list(row_slices(12, 3))


def test_a_fake_loss_has_the_peak_of_the_real_one() -> None:
    def peak(fake: bool) -> int:
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.autograd.set_grad_enabled(True):
            hidden = torch.zeros(4000, 8, requires_grad=True)
            weight, labels = torch.zeros(5000, 8), torch.zeros(4000, dtype=torch.int64)
            with StorageTrace() as trace:
                linear_cross_entropy(hidden, weight, labels).backward()
        return trace.peak()[0]

    assert peak(fake=True) == peak(fake=False)


@given(sizes=st.lists(st.integers(1, 9), max_size=6), count=st.integers(1, 12))
def test_regrouped_rows_are_the_same_rows(sizes: list[int], count: int) -> None:
    rows = torch.arange(2.0 * sum(sizes)).view(-1, 2)

    def slices() -> Iterator[tuple[int, Tensor]]:
        first = 0
        for size in sizes:
            yield first, rows[first : first + size]
            first += size

    blocks = list(regrouped_rows(slices(), count))
    assert [first for first, _ in blocks] == list(range(0, len(rows), count))
    assert all(len(block) == count for _, block in blocks[:-1])
    assert torch.equal(torch.cat([block for _, block in blocks] or [rows]), rows)


def test_skipped_results_take_their_memory_where_they_are_joined() -> None:
    def results(rows: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for part in row_slices(len(rows), 2, rows):
            fill_skipped_(found, part)
            found.append(rows[part] + 1)
        return found

    rows = torch.arange(40.0).view(20, 2)
    assert torch.equal(joined(results(rows)), rows + 1) and len(results(rows)) == 10
    assert len(joined(results(rows[:2]))) == 2
    with FakeTensorMode() as mode:
        fake = results(mode.from_tensor(rows))
        assert len(fake) == 5 and joined(fake).shape == rows.shape
