"""Tests of integer products against fp32 products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_lite import LoraConfig, QuantConfig, add_lora_, quantize_base_
from qlora_lite.choices import DEFAULTS, FP32, INT_MM, INTEGER_PRODUCTS, choices_in_force
from qlora_lite.errors import ConfigError
from qlora_lite.quantization import int8_matmul
from qlora_lite.quantization.int8_matmul import OUTLIER, outlier_columns, quantize_rows
from qlora_lite.quantization.int8_matmul import int8_product as product
from qlora_lite.quantization.packed_weight import PackedWeight


def packed(out: int = 24, columns: int = 32) -> PackedWeight:
    return PackedWeight.of(torch.randn(out, columns), QuantConfig(format="int8", int8_activations=True))


def error(y: Tensor, x: Tensor, weight: PackedWeight) -> float:
    exact = x.double() @ weight.dequantize(torch.float64).T
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("kernel", [INT_MM, FP32])
@pytest.mark.parametrize("slice_values", [1, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_close_to_the_exact_product(
    dtype: torch.dtype, slice_values: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_matmul, "SLICE_VALUES", slice_values)
    monkeypatch.setattr(int8_matmul, "FP32_VALUES", slice_values)
    weight, x = packed(), torch.randn(40, 32).clamp(-5, 5).to(dtype)
    with choices_in_force({**DEFAULTS, INTEGER_PRODUCTS: kernel}):
        y = product(x, weight.packed, weight.absmax)
    assert torch.equal(y, product(x, weight.packed, weight.absmax))  # sums of so few columns are exact in fp32
    assert y.dtype == dtype and y.shape == (40, 24)
    assert error(y, x, weight) < 0.01


def test_columns_with_large_values_are_kept_apart() -> None:
    weight, x = packed(), torch.randn(40, 32).clamp(-5, 5)
    x[3, 7], x[5, 20] = 1000.0, -OUTLIER
    assert outlier_columns(x).tolist() == [7, 20]
    codes, absmax = quantize_rows(x, torch.tensor([7, 20]))
    assert not codes[:, [7, 20]].any() and float(absmax.max()) <= 5
    exact = x.double() @ weight.dequantize(torch.float64).T
    careful = (product(x, weight.packed, weight.absmax) - exact).abs()[3].max()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_matmul, "OUTLIER", 1e9)
        careless = (product(x, weight.packed, weight.absmax) - exact).abs()[3].max()
    assert careful < 0.05 * careless


def test_rows_of_zeros_and_of_nothing_but_outliers() -> None:
    weight = packed()
    x = torch.zeros(20, 32)
    x[1] = 100.0
    y = product(x, weight.packed, weight.absmax)
    assert not y[0].any()
    torch.testing.assert_close(y[1], weight.dequantize(torch.float32) @ x[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("rows", "width", "used"), [(40, 32, True), (3, 32, False), (40, 30, False)])
def test_used_where_it_was_asked_for_and_shapes_allow(rows: int, width: int, used: bool) -> None:
    weight = packed(columns=width)
    assert (weight.integer_product(torch.randn(rows, width)) is not None) == used
    weight.int8_activations = False
    assert weight.integer_product(torch.randn(rows, width)) is None


def test_an_adapted_layer_trains_on_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 24))
    exact = model[0].weight.detach().clone()
    quantize_base_(model, QuantConfig(format="int8", int8_activations=True))
    add_lora_(model, LoraConfig(rank=2, target_modules=["0"]))
    torch.nn.init.normal_(model[0].lora_B)
    x = torch.randn(40, 32, requires_grad=True)
    y = model(x)
    plain = x @ exact.T + model[0].bias + model[0].scaling * x @ model[0].lora_A.T @ model[0].lora_B.T
    assert 0 < float((y - plain).detach().norm() / plain.detach().norm()) < 0.02
    inputs = (x, model[0].lora_A, model[0].lora_B)
    grad = torch.randn_like(y)
    for mine, theirs in zip(*(torch.autograd.grad(z, inputs, grad) for z in (y, plain)), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.02


def test_it_needs_the_format() -> None:
    with pytest.raises(ConfigError, match="int8_activations need format int8; got 'nf4'"):
        QuantConfig(int8_activations=True)
