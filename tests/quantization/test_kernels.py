"""Tests of the kernels of the formats against bitsandbytes, for all ends of rows, blocks and chunks."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from qlora_lite.quantization.config import QuantConfig
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
    monkeypatch.setattr("qlora_lite.quantization.kernels.CHUNK_VALUES", 4096)
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


@pytest.mark.parametrize("offset", [0, 1, 4, 8, 16, 17])
@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig("int8", int8_activations=True)], ids=["nf4", "int8"])
def test_codes_at_any_address_give_the_same(config: QuantConfig, offset: int) -> None:
    weight, x = PackedWeight.of(torch.randn(64, 128), config), torch.randn(64, 128).bfloat16()

    def results() -> list[Tensor | None]:
        products = weight.integer_product(x), weight.few_rows_product(x[:2])
        return [weight.dequantize_rows(0, 32, torch.bfloat16), *products]

    wanted = results()
    around = torch.empty(weight.packed.numel() + 128, dtype=weight.packed.dtype)
    begin = -around.data_ptr() % 64 + offset
    codes = around[begin : begin + weight.packed.numel()].view(weight.packed.shape)
    weight.packed = codes.copy_(weight.packed)
    found = results()
    if offset % 16 and config.format == "int8":  # the kernel for few rows would end the process
        assert found.pop() is None and wanted.pop() is not None
    for one, other in zip(wanted, found, strict=True):
        assert (one is None and other is None) or (one is not None and other is not None and torch.equal(one, other))
