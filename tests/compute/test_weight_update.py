"""Tests of adding scaling * B A to a weight in tiles against the plain product."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.compute.weight_update import Delta, Replacement


@given(
    rows=st.integers(1, 700),
    columns=st.integers(1, 70),
    rank=st.integers(1, 9),
    tiles=st.integers(1, 3),
    scaling=st.sampled_from([0.0, 0.37, 2.0]),
)
def test_slices_give_the_bits_of_the_whole(rows: int, columns: int, rank: int, tiles: int, scaling: float) -> None:
    delta = Delta(torch.randn(rows, rank), torch.randn(rank, columns), scaling)
    base = torch.randn(rows, columns)
    whole = delta.add_to_(base.clone(), 0)
    exact = base.double() + scaling * delta.left.double() @ delta.right.double()
    torch.testing.assert_close(whole.double(), exact, rtol=1e-5, atol=1e-5)
    step = tiles * Delta.TILE_ROWS
    pieces = [delta.add_to_(base[start : start + step].clone(), start) for start in range(0, rows, step)]
    assert torch.equal(torch.cat(pieces), whole)
    expected = float((scaling * delta.left.double() @ delta.right.double()).square().sum())
    assert delta.squared_norm() == pytest.approx(expected, rel=1e-9)


@given(seed=st.integers(0, 99))
def test_an_update_that_cancels_has_no_negative_norm(seed: int) -> None:
    torch.manual_seed(seed)
    left, right = torch.randn(50, 1), torch.randn(1, 30)
    delta = Delta(torch.cat((left, left, -2 * left), 1), right.repeat(3, 1), 1.0)
    assert 0 <= delta.squared_norm() < 1e-9
    assert Delta(left, right, 1e300).squared_norm() == math.inf


def test_transposed_it_updates_the_weight_the_other_way_round() -> None:
    delta = Delta(torch.randn(7, 2), torch.randn(2, 5), 1.5)
    base = torch.randn(7, 5)
    assert delta.transposed.shape == (5, 7)
    turned = delta.transposed.add_to_(base.T.contiguous(), 0).T
    torch.testing.assert_close(turned, base + 1.5 * delta.left @ delta.right)


@pytest.mark.parametrize("by_columns", [False, True])
def test_output_norms_are_the_norms_of_what_is_merged_in_slices_as_in_one(by_columns: bool) -> None:
    torch.manual_seed(0)
    rows, columns = 3 * Delta.TILE_ROWS + 5, 24
    weight, output_norms = torch.randn(rows, columns), torch.rand(columns if by_columns else rows) + 0.5
    plain = Delta(torch.randn(rows, 3), torch.randn(3, columns), 1.5, output_norms, by_columns)
    pieces = [(first, weight[first : first + Delta.TILE_ROWS]) for first in range(0, rows, Delta.TILE_ROWS)]
    delta = plain.prepared(lambda: pieces)
    merged = delta.add_to_(weight.clone(), 0)
    parts = [delta.add_to_(piece.clone(), first) for first, piece in pieces]
    assert torch.equal(torch.cat(parts), merged)
    torch.testing.assert_close(merged.norm(dim=0 if by_columns else 1), output_norms)
    direction = weight + 1.5 * plain.left @ plain.right
    torch.testing.assert_close(plain.norms_of([(0, weight)]), direction.norm(dim=0 if by_columns else 1))
    turned = plain.transposed.prepared(lambda: [(0, weight.T.contiguous())])
    torch.testing.assert_close(turned.add_to_(weight.T.contiguous(), 0).T, merged)


def test_what_replaces_a_weight_stands_in_its_place_slice_by_slice() -> None:
    whole, rows = torch.randn(10, 4), torch.randn(3, 4)
    all_of_it = Replacement(lambda start, stop: whole[start:stop], whole)
    some = Replacement(lambda start, stop: rows[start:stop], rows, (7, 0, 9))
    base = torch.randn(10, 4)
    expected = base.clone()
    expected[[7, 0, 9]] = rows
    for update, wanted in ((all_of_it, whole), (some, expected)):
        made = torch.cat([update.add_to_(base[first : first + 4].clone(), first) for first in (0, 4, 8)])
        assert torch.equal(made, wanted) and update.prepared(list) is update and not update.low_rank


def test_a_stack_is_replaced_matrix_by_matrix_and_each_is_read_once() -> None:
    stack, reads = torch.randn(3, 70, 4), []

    def values(start: int, stop: int) -> torch.Tensor:
        reads.append((start, stop))
        return stack[start:stop]

    update = Replacement(values, stack, stack=3)
    for index, matrix in enumerate(update.matrices):
        rows = torch.zeros(70, 4)
        for start in (0, 64):
            matrix.add_to_(rows[start : start + 64], start)
        assert torch.equal(rows, stack[index])
    assert len(update.matrices) == 3 and reads == [(0, 1), (1, 2), (2, 3)]
    assert Replacement(values, stack).matrices == (Replacement(values, stack),)
