"""Tests of packed weights: moved, copied and cast with a module, and values that cannot be packed."""

from __future__ import annotations

import copy
import io

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from qlora_lite.errors import QuantizationError
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight, check_packable


@pytest.mark.parametrize(("format", "error", "relative"), [("nf4", 0.0728, 0.203), ("fp4", 0.0965, 0.260)])
def test_error_on_normal_weights_is_the_published_one(format: str, error: float, relative: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024)
    values = PackedWeight.of(weight, QuantConfig(format, 64, False)).dequantize(torch.float32)
    assert (values - weight).abs().mean().item() == pytest.approx(error, rel=0.03)
    assert ((values - weight).abs() / weight.abs()).mean().item() == pytest.approx(relative, rel=0.5)


@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(double_quant=False), QuantConfig(format="int8")])
def test_every_bit_survives(config: QuantConfig) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(PackedWeight.of(torch.randn(48, 96), config), torch.nn.Parameter(torch.randn(48)))
    wanted = layer.weight.dequantize(torch.float32)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    empty = PackedWeight((48, 96), config.format, config.blocksize, config.double_quant)
    empty.load_state_dict(layer.weight.state_dict())
    copies = [
        copy.deepcopy(layer).half().weight,
        copy.deepcopy(layer).to(torch.bfloat16).double().weight,
        copy.deepcopy(layer).to("cpu").weight,
        torch.load(file, weights_only=False).weight,
        empty,
    ]
    for other in copies:
        assert torch.equal(other.dequantize(torch.float32), wanted)
        assert {n: b.dtype for n, b in other.named_buffers()} == {n: b.dtype for n, b in layer.weight.named_buffers()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_are_named_with_their_place(bad: float) -> None:
    weight = torch.ones(8, 8)
    weight[3, 5] = weight[6, 1] = bad
    with pytest.raises(QuantizationError, match=r"mlp\.weight holds -?(nan|inf) at index \(3, 5\)"):
        PackedWeight.of(weight, QuantConfig(), name="mlp.weight")
    with pytest.raises(
        QuantizationError, match=r"reaches 70000, above 65504, the limit of int8; use nf4, fp4 or none$"
    ):
        PackedWeight.of(torch.full((2, 2), 7e4), QuantConfig(format="int8"))
    with pytest.raises(QuantizationError, match="must be a matrix of floats"):
        PackedWeight.of(torch.ones(3), QuantConfig())


@given(st.sampled_from(["nf4", "fp4", "int8"]), st.integers(1, 40), st.integers(1, 300), st.booleans(), st.data())
def test_slices_of_rows_are_those_of_the_whole(
    format: str, rows: int, columns: int, double_quant: bool, data: st.DataObject
) -> None:
    packed = PackedWeight.of(torch.randn(rows, columns), QuantConfig(format, 64, double_quant))
    whole = packed.dequantize(torch.float32)
    start = data.draw(st.integers(0, (rows - 1) // packed.row_step)) * packed.row_step
    stop = min(rows, start + data.draw(st.integers(1, rows)) * packed.row_step)
    assert torch.equal(packed.dequantize_rows(start, stop, torch.float32), whole[start:stop])


@pytest.mark.parametrize(
    ("weight", "what"),
    [
        (torch.ones(3), "must be a matrix of floats"),
        (torch.ones(3, 3, dtype=torch.int64), "must be a matrix of floats"),
        (torch.ones(0, 3), "has no values"),
        (torch.full((2, 2), 1e5), "above 65504, the limit of int8; use nf4"),
    ],
)
def test_what_cannot_be_packed_is_said(weight: Tensor, what: str) -> None:
    with pytest.raises(QuantizationError, match=what):
        check_packable(weight, "layer.weight", "int8")
