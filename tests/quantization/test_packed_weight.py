"""Packed weights against bitsandbytes' own, and through everything that moves or copies a module."""

from __future__ import annotations

import copy
import io

import bitsandbytes.functional as bnb
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from qlora_lite.errors import QuantizationError
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight

SHAPES = [(64, 64), (33, 65), (7, 1000), (1, 1), (3, 3), (300, 500), (100, 96)]


def reference(weight: Tensor, format: str, blocksize: int, double_quant: bool) -> tuple[Tensor, Tensor, Tensor]:
    """bitsandbytes' codes and statistics, and the values by the definition: code[index] * absmax of the block."""
    codes, state = bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=format)
    absmax = state.absmax
    if double_quant:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    nibbles = torch.stack((codes.view(-1) >> 4, codes.view(-1) & 15), 1).view(-1)[: weight.numel()].long()
    table = bnb.get_4bit_type(format, device="cpu")
    values = table[nibbles] * absmax.repeat_interleave(blocksize)[: weight.numel()]
    return codes.view(-1), state.absmax, values.view_as(weight)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 1024, 4096])
@pytest.mark.parametrize("double_quant", [True, False])
def test_codes_statistics_and_values_are_bitsandbytes(format: str, blocksize: int, double_quant: bool) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = torch.randn(shape).to(dtype)
            packed = PackedWeight.of(weight, QuantConfig(format, blocksize, double_quant))
            codes, absmax, values = reference(weight, format, blocksize, double_quant)
            assert torch.equal(packed.packed, codes) and torch.equal(packed.absmax, absmax)
            torch.testing.assert_close(packed.dequantize(torch.float32), values, rtol=1e-5, atol=1e-6)


def test_the_number_of_threads_changes_no_bit() -> None:
    weight, threads = torch.randn(1600, 2048), torch.get_num_threads()  # more statistics than torch sums in one thread
    packed = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            packed.append(PackedWeight.of(weight, QuantConfig()).state_dict())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(value, packed[1][name]) for name, value in packed[0].items())


@hypothesis.settings(max_examples=150)
@given(
    st.tuples(st.integers(1, 130), st.integers(1, 260)),
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from([64, 128, 256, 512, 1024, 2048, 4096]),
)
def test_values_are_right_wherever_rows_and_blocks_end(shape: tuple[int, int], format: str, blocksize: int) -> None:
    weight = torch.linspace(-3, 3, shape[0] * shape[1]).view(shape)
    values = reference(weight, format, blocksize, False)[2]
    packed = PackedWeight.of(weight, QuantConfig(format, blocksize, False))
    assert torch.equal(packed.dequantize(torch.float32), values)
    assert torch.equal(packed.dequantize(torch.bfloat16), values.bfloat16())


def test_weights_larger_than_a_chunk_are_packed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(100, 321)
    whole = PackedWeight.of(weight, QuantConfig())
    rows = PackedWeight.of(weight, QuantConfig(format="int8"))
    monkeypatch.setattr("qlora_lite.quantization.packed_weight.CHUNK_VALUES", 4096)
    assert torch.equal(PackedWeight.of(weight, QuantConfig()).packed, whole.packed)
    again = PackedWeight.of(weight, QuantConfig(format="int8"))
    assert torch.equal(again.packed, rows.packed)
    assert torch.equal(again.dequantize(torch.float32), rows.dequantize(torch.float32))


def test_int8_rows_are_bitsandbytes_and_zero_rows_stay_zero() -> None:
    weight = torch.randn(20, 30)
    weight[4] = 0
    packed = PackedWeight.of(weight, QuantConfig(format="int8"))
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
    assert torch.equal(packed.absmax, absmax)
    assert torch.equal(packed.packed[:4], codes[:4]) and torch.equal(packed.packed[5:], codes[5:])
    values = packed.dequantize(torch.float32)
    assert not values[4].any() and (values - weight).abs().max() <= weight.abs().max() / 127
    assert torch.equal(packed.rows(torch.tensor([[3, 4]]), torch.float32), values[[3, 4]].unsqueeze(0))


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
    with pytest.raises(QuantizationError, match=r"reaches 70000, above 65504"):
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
