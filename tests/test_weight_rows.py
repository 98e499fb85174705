"""Rows of a weight, wherever it is, against the tensor that a model would hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qlora_lite import QuantConfig, weight_rows
from qlora_lite.delta import Delta
from qlora_lite.errors import CheckpointError, QuantizationError
from qlora_lite.quantize import PackedWeight
from qlora_lite.tensor_files import StoredTensor, tensors_in
from qlora_lite.tensor_views import Transposed
from qlora_lite.weight_rows import (
    DenseRows,
    PackedRows,
    RepackedRows,
    Sources,
    StoredRows,
    ToBePacked,
    common_step,
    packed_rows,
    slice_starts,
)


def stored(folder: Path, tensor: torch.Tensor) -> StoredTensor:
    save_file({"w": tensor}, folder / "w.safetensors")
    return tensors_in(folder / "w.safetensors")["w"]


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(70, 64), (33, 40), (300, 96)])
def test_packed_from_slices_of_a_file_it_is_packed_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, double_quant: bool, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape)
    config = QuantConfig(format=format, double_quant=double_quant)
    monkeypatch.setattr(weight_rows, "READ_BYTES", 1)  # the least that the format allows at once
    source = ToBePacked(stored(tmp_path, weight), config, format, torch.bfloat16)
    ours, whole = source.pack(torch.device("cpu")), PackedWeight.of(weight.bfloat16(), config)
    assert ours.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in ours.state_dict().items())
    values = whole.dequantize(torch.float32)
    for rows in (RepackedRows(source), PackedRows(whole)):
        pieces = [rows.rows(start, stop) for start, stop in slice_starts(rows.shape, rows.step, 1)]
        assert torch.equal(torch.cat(pieces), values) and (len(pieces) > 1 or rows.step >= shape[0])


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_weight_that_was_turned_round_to_be_packed_gives_its_rows_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    weight, config = torch.randn(40, 70), QuantConfig(format=format)
    monkeypatch.setattr(weight_rows, "READ_BYTES", 1)
    source = ToBePacked(Transposed(stored(tmp_path, weight)), config, format, torch.float32)
    whole = PackedWeight.of(weight.T.contiguous(), config)
    values = whole.dequantize(torch.float32).T
    for rows in (RepackedRows(source, transposed=True), packed_rows(whole, transposed=True)):
        assert rows.shape == (40, 70)
        pieces = [rows.rows(start, stop) for start, stop in slice_starts(rows.shape, rows.step, 4 * 70 * 9)]
        assert len(pieces) == 5 and torch.equal(torch.cat(pieces), values)


def test_a_file_is_rounded_as_loading_rounds_it(tmp_path: Path) -> None:
    weight = torch.randn(5, 3)
    kept = stored(tmp_path, weight)
    assert torch.equal(StoredRows(kept).rows(1, 4), weight[1:4])
    assert torch.equal(StoredRows(kept, torch.bfloat16).rows(1, 4), weight[1:4].bfloat16().float())
    assert torch.equal(DenseRows(weight.bfloat16()).rows(1, 4), weight[1:4].bfloat16().float())
    assert DenseRows(torch.tensor(2.0)).rows(0, 1) == 2.0


def test_what_cannot_be_packed_is_named_with_its_place_in_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(64, 64)
    weight[40, 2] = torch.nan
    monkeypatch.setattr(weight_rows, "READ_BYTES", 1)
    source = ToBePacked(stored(tmp_path, weight), QuantConfig(), "nf4", torch.float32)
    with pytest.raises(QuantizationError, match=r"w holds nan at index \(40, 2\)"):
        source.pack(torch.device("cpu"))


@given(rows=st.integers(1, 50), columns=st.integers(1, 9), step=st.integers(1, 8), largest=st.integers(1, 400))
def test_slices_cover_all_rows_once(rows: int, columns: int, step: int, largest: int) -> None:
    starts = list(slice_starts((rows, columns), step, largest))
    assert [row for start, stop in starts for row in range(start, stop)] == list(range(rows))
    assert all(start % step == 0 for start, _ in starts)
    assert all((stop - start) * columns * 4 <= largest or stop - start <= step for start, stop in starts)


def test_a_common_step_is_a_multiple_of_each() -> None:
    assert common_step(4, 6, 1) == 12 and common_step() == 1


@given(rows=st.integers(1, 40), largest=st.integers(1, 2000), seed=st.integers(0, 99))
def test_merged_slices_are_the_sum_of_the_base_that_is_asked_for(rows: int, largest: int, seed: int) -> None:
    torch.manual_seed(seed)
    trained, original, delta = (
        torch.randn(rows, 6),
        torch.randn(rows, 6),
        Delta(torch.randn(rows, 2), torch.randn(2, 6), 3),
    )
    sources = Sources("w", [DenseRows(trained)], [DenseRows(original)], lambda: delta)
    update = 3 * delta.left @ delta.right
    assert torch.equal(torch.cat(list(sources.base(largest))), trained)
    for base, from_original in ((trained, False), (original, True)):
        merged = torch.cat(list(sources.merged(from_original, torch.float16, largest)))
        torch.testing.assert_close(merged, (base + update).half(), rtol=2e-3, atol=1e-4)
    with pytest.raises(CheckpointError, match="the checkpoint's own w is not at hand"):
        Sources("w", [DenseRows(trained)], None, lambda: delta).merged(True, torch.float16, largest)
