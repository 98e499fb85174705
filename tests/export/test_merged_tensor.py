"""Tests of merged tensors as lazy tensors: any rows, in any order, are those of the whole, and figures are exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_lite import QuantConfig
from qlora_lite.checkpoints.lazy_tensors import Concatenated, Narrowed
from qlora_lite.compute.weight_update import Delta, Replacement, StackDelta, Update
from qlora_lite.errors import QuantizationError
from qlora_lite.export import merged_tensor
from qlora_lite.export.merged_tensor import IntegerTensor, MergedTensor, TransposedOnce, view_slices
from qlora_lite.export.report import TensorFigures
from qlora_lite.export.weight_rows import DenseRows, PackedRows, WeightRows
from qlora_lite.quantization.packed_weight import PackedWeight


def delta(rows: int, columns: int) -> Delta:
    return Delta(torch.randn(rows, 2), torch.randn(2, columns), 0.5)


def made(
    versions: list[tuple[WeightRows, ...]], update: Update | None, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[MergedTensor, list[TensorFigures]]:
    found: list[TensorFigures] = []
    maker = None if update is None else lambda: update
    return MergedTensor("w", shape, dtype, versions, maker, found.append), found


def whole(tensor: MergedTensor) -> Tensor:
    return torch.cat(list(tensor.slices())).view(tensor.shape)


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(1, 199), max_size=4, unique=True), dtype=st.sampled_from([torch.float32, torch.half]))
def test_rows_cut_anywhere_are_those_of_the_whole_bit_for_bit(cuts: list[int], dtype: torch.dtype) -> None:
    packed, original = PackedWeight.of(torch.randn(200, 24), QuantConfig()), torch.randn(200, 24)
    versions: list[tuple[WeightRows, ...]] = [(PackedRows(packed), DenseRows(original))]
    update = delta(200, 24)
    tensor, figures = made(versions, update, (200, 24), dtype)
    expected = packed.dequantize(torch.float32)
    expected = update.add_to_(expected.clone(), 0).to(dtype)
    assert torch.equal(whole(tensor), expected)
    borders = [0, *sorted(cuts), 200]
    parts = [tensor.rows(start, stop) for start, stop in itertools.pairwise(borders)]
    assert torch.equal(torch.cat(parts), expected)
    one, other = figures  # each time that all rows have been read
    assert one.values == other.values == 4800 and one.moved == other.moved and one.update == other.update
    for name in ("weight", "quantization", "rounding"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9)
    assert (one.rounding > 0) == (dtype == torch.half)


@pytest.mark.parametrize("kind", ["stack", "replacement", "none"])
def test_a_stack_is_read_matrix_by_matrix(kind: str) -> None:
    base, trained = torch.randn(3, 70, 8), torch.randn(3, 70, 8)
    stack = StackDelta(tuple(delta(70, 8) for _ in range(3)))
    updates: dict[str, tuple[Update | None, Tensor]] = {
        "stack": (stack, stack.add_to_(base.clone(), 0)),
        "replacement": (Replacement(lambda start, stop: trained[start:stop], trained, stack=3), trained),
        "none": (None, base),
    }
    update, expected = updates[kind]
    tensor, figures = made([(DenseRows(matrix),) for matrix in base], update, (3, 70, 8), torch.float32)
    assert torch.equal(whole(tensor), expected) and torch.equal(tensor.rows(1, 3), expected[1:])
    assert figures[0].values == expected.numel() and len(figures) == 1
    assert torch.equal(tensor.rows(0, 1), expected[:1]) and len(figures) == 2
    if update is not None:
        assert figures[0].update == pytest.approx(float((expected - base).square().sum()), rel=1e-4)
    halves = [Narrowed("up", tensor, 1, 35, 35), Narrowed("gate", tensor, 1, 0, 35)]
    for half, part in zip(halves, (slice(35, 70), slice(35)), strict=True):
        assert torch.equal(torch.cat(list(view_slices(half))).view(half.shape), expected[:, part])
        assert torch.equal(half.select(2).rows(3, 20), expected[2, part][3:20])
    turned = TransposedOnce(tensor, 1, 2)
    assert turned.shape == (3, 8, 70)
    assert torch.equal(torch.cat(list(view_slices(turned))).view(3, 8, 70), expected.mT)


def test_an_update_is_read_once_and_dropped_after_the_last_row() -> None:
    calls: list[int] = []

    def maker() -> Delta:
        calls.append(1)
        return delta(130, 8)

    tensor = MergedTensor(
        "w", (130, 8), torch.float32, [(DenseRows(torch.randn(130, 8)),)], maker, lambda figures: None
    )
    for start in (64, 0):
        tensor.rows(start, start + 64)
        assert len(calls) == 1 and tensor._update is not None
    tensor.rows(128, 130)
    assert tensor._update is None and tensor._figures is None


def test_rows_of_several_tensors_are_put_together_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_tensor, "SLICE_BYTES", 64 * 8 * 4)
    parts = [torch.randn(rows, 8) for rows in (130, 70, 5)]
    tensors = tuple(made([(DenseRows(part),)], delta(*part.shape), part.shape, torch.float32)[0] for part in parts)
    expected = torch.cat([whole(tensor) for tensor in tensors])
    assert max(len(rows) for rows in tensors[0].slices()) == 64
    joined = list(view_slices(Concatenated("qkv", tensors, 0)))
    assert max(map(len, joined)) == 64
    assert joined[0].shape == (64, 8) and sum(map(len, joined)) == 205 and expected.shape == (205, 8)


def test_a_transposed_matrix_is_read_once() -> None:
    weight = torch.randn(30, 7)
    tensor, figures = made([(DenseRows(weight),)], None, (30, 7), torch.float32)
    turned = TransposedOnce(tensor, 0, 1)
    assert torch.equal(turned.rows(0, 3), weight.T[:3]) and turned._held is not None
    assert torch.equal(turned.rows(3, 7), weight.T[3:]) and turned._held is None
    assert len(figures) == 1 and torch.equal(TransposedOnce(tensor, 0, 1).select(2).rows(1, 4), weight.T[2][1:4])


def test_scalars_and_integers() -> None:
    scalar, figures = made([(DenseRows(torch.tensor(1.5)),)], None, (), torch.float16)
    assert torch.equal(next(view_slices(scalar)), torch.tensor(1.5, dtype=torch.float16)) and figures[0].values == 1
    counts = IntegerTensor("n", (3,), torch.int64, lambda: torch.arange(3))
    assert torch.equal(next(view_slices(counts)), torch.arange(3)) and torch.equal(
        counts.rows(1, 3), torch.arange(1, 3)
    )
    assert torch.equal(next(view_slices(Narrowed("m", counts, 0, 1, 2))), torch.arange(1, 3))


def test_a_value_beyond_the_dtype_names_the_tensor() -> None:
    tensor, _ = made([(DenseRows(torch.full((2, 3), 1e6)),)], None, (2, 3), torch.float16)
    with pytest.raises(QuantizationError, match="w reaches 1e\\+06, above 65504"):
        tensor.rows(0, 2)
