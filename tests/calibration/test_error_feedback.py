"""Tests of error feedback, against the method written down column by column in fp64 with an explicit inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_lite import QuantConfig
from qlora_lite.calibration.error_feedback import FACTORS, SHIFT, pack_with_feedback, shifted
from qlora_lite.calibration.input_products import InputProducts
from qlora_lite.errors import QuantizationError
from qlora_lite.quantization.kernels import block_absmax, code_values, nested_code
from qlora_lite.quantization.packed_weight import PackedWeight

BLOCK = 64


def inputs(columns: int, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated inputs of very different sizes, and others near them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = 0.2 * torch.randn(columns, columns, generator=generator) + torch.diag(3 * torch.rand(columns).pow(3))
    packed = (torch.randn(tokens, columns, generator=generator) @ mixing).double()
    return packed, packed + 0.1 * torch.randn(tokens, columns, generator=generator)


def products_of(packed: Tensor, plain: Tensor, dtype: torch.dtype = torch.float64) -> InputProducts:
    found = InputProducts(packed.shape[1], packed.device, dtype)
    found.add(packed, plain)
    return found


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """The nearest value of a table to each value, by comparing with all."""
    return table[(values.unsqueeze(-1) - table).abs().argmin(-1)]


def as_written_down(
    weight: Tensor, packed: Tensor, plain: Tensor, format: str, double_quant: bool
) -> tuple[Tensor, Tensor]:
    """The packed values, and the absmax `(rows, blocks)`, in fp64."""
    hessian = packed.T @ packed
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    drift = packed.T @ plain - hessian  # of X^T Y the transpose is used below
    left = weight + SHIFT * weight @ drift.T @ torch.linalg.inv(damped)
    table = torch.tensor(code_values(format), dtype=torch.float64)
    blocks = left.view(len(left), -1, BLOCK).abs().amax(2)
    largest = (blocks.max() * 1.25).float().double()  # the blocks are of one group
    statistics = torch.tensor(nested_code(), dtype=torch.float64) * largest
    sizes = hessian.diagonal().view(-1, BLOCK)
    result, absmax = torch.empty_like(left), torch.empty_like(blocks)
    inverse = torch.linalg.inv(damped)
    signs = (1.0,) if format == "fp4" else (1.0, -1.0)
    for block in sizes.sum(1).argsort(descending=True).tolist():
        columns = (block * BLOCK + sizes[block].argsort(descending=True)).tolist()
        factors = torch.tensor([s * f for s in signs for f in FACTORS], dtype=torch.float64)
        tried = factors.unsqueeze(1) * left[:, columns].abs().amax(1)
        tried = nearest(tried, statistics) if double_quant else tried.float().double()
        state = left.repeat(len(tried), 1, 1)  # (tried, rows, columns)
        values, loss, rest = torch.empty_like(state), torch.zeros_like(tried), inverse.clone()
        for column in columns:
            value = state[..., column]
            values[..., column] = nearest(value / tried, table) * tried
            error = value - values[..., column]
            loss += error**2 / rest[column, column]
            state = state - error.unsqueeze(-1) * rest[column] / rest[column, column]
            rest = rest - torch.outer(rest[:, column], rest[column]) / rest[column, column]
        best = loss.argmin(0)
        for row, choice in enumerate(best.tolist()):
            result[row, columns] = values[choice, row, columns]
            absmax[row, block] = tried[choice, row]
            left[row] = state[choice, row]
        inverse = rest
    return result, absmax


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_it_is_the_method_written_down(format: str, double_quant: bool) -> None:
    packed_inputs, plain_inputs = inputs(128)
    weight = 0.1 * torch.randn(3, 128)
    products = products_of(packed_inputs, plain_inputs)
    config = QuantConfig(format, double_quant=double_quant)
    done = pack_with_feedback(weight, products, products.order(BLOCK), config, format)
    values, absmax = as_written_down(weight.double(), packed_inputs, plain_inputs, format, double_quant)
    found = block_absmax(done.packed, 0, 6).view(3, 2)
    torch.testing.assert_close(found.double(), absmax, rtol=1e-6, atol=0)
    torch.testing.assert_close(done.packed.dequantize(torch.float32).double(), values, rtol=1e-6, atol=1e-12)
    if format == "nf4":
        assert (found < 0).any() and (found > 0).any()


def test_the_whole_shift_is_the_least_squares_solution() -> None:
    packed = torch.randn(300, 64, dtype=torch.float64)  # all columns alike, so that damping hardly matters
    plain = packed + 0.3 * torch.randn(300, 64)
    weight = torch.randn(7, 64, dtype=torch.float64)
    products = products_of(packed, plain)
    order = products.order(BLOCK)
    exact = torch.linalg.lstsq(packed, plain @ weight.T).solution.T
    damped = shifted(weight, products, order, 1.0)
    assert (damped - exact).norm() < 0.1 * (weight - exact).norm()
    half = shifted(weight, products, order, 0.5)
    torch.testing.assert_close(half, (weight + damped) / 2)
    torch.testing.assert_close(shifted(weight, products_of(packed, packed), order, 1.0), weight)


@settings(max_examples=15)
@given(
    st.integers(0, 99),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([64, 128]),
    st.sampled_from([64, 128]),
    st.booleans(),
)
def test_the_output_is_nearer_than_with_rounding(seed: int, rows: int, columns: int, block: int, nested: bool) -> None:
    if columns % block:
        return
    packed, _ = inputs(columns, seed=seed)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    products = products_of(packed.float(), packed.float(), torch.float32)
    config = QuantConfig(blocksize=block, double_quant=nested)
    done = pack_with_feedback(weight, products, products.order(block), config, "nf4")
    rounded = PackedWeight.of(weight, config)
    whole = (packed @ weight.double().T).square().sum()
    errors = [
        (packed @ (each.dequantize(torch.float32) - weight).double().T).square().sum() / whole
        for each in (rounded, done.packed)
    ]
    assert done.errors.rounded == pytest.approx(float(errors[0]), rel=1e-3)
    assert done.errors.calibrated == pytest.approx(float(errors[1]), rel=1e-3)
    assert done.errors.calibrated < 0.8 * done.errors.rounded


def test_slices_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = inputs(64)
    weight, products = torch.randn(40, 64), products_of(packed, plain)
    order = products.order(BLOCK)
    whole = pack_with_feedback(weight, products, order, QuantConfig(), "nf4")
    monkeypatch.setattr("qlora_lite.calibration.error_feedback.VALUES_AT_ONCE", 7 * 14 * 64)
    sliced = pack_with_feedback(weight, products, order, QuantConfig(), "nf4")
    assert all(
        torch.equal(value, sliced.packed.state_dict()[name]) for name, value in whole.packed.state_dict().items()
    )


def test_zeros_stay_zeros_and_inputs_may_be_zero() -> None:
    weight = torch.randn(4, 128)
    weight[1], weight[2, :64] = 0, 0
    products = InputProducts(128, weight.device)
    products.add(torch.zeros(10, 128), torch.zeros(10, 128))
    done = pack_with_feedback(weight, products, products.order(BLOCK), QuantConfig(), "nf4")
    values = done.packed.dequantize(torch.float32)
    assert not values[1].any() and not values[2, :64].any() and values[0].any()
    assert done.errors.calibrated == done.errors.rounded == 0


def test_what_is_not_finite_is_named() -> None:
    products = InputProducts(64, torch.device("cpu"))
    products.add(torch.full((4, 64), torch.nan), torch.zeros(4, 64))
    with pytest.raises(QuantizationError, match="the inputs of a layer hold NaN or infinity on the calibration text"):
        products.order(BLOCK)
    good = products_of(*inputs(64))
    with pytest.raises(QuantizationError, match=r"up_proj.weight holds nan at index \(2, 5\)"):
        weight = torch.ones(3, 64)
        weight[2, 5] = torch.nan
        pack_with_feedback(weight, good, good.order(BLOCK), QuantConfig(), "nf4", "up_proj.weight")
