"""Tests of the figures of an export against written-out sums, and of its table as text."""

from __future__ import annotations

import pytest
import torch

from qlora_lite.export.report import MergeReport, TensorFigures, render


def figures(name: str, base: torch.Tensor, original: torch.Tensor, update: torch.Tensor) -> TensorFigures:
    computed = base + update
    written = computed.half()
    made = TensorFigures(name, base.numel(), update=float(update.square().sum()))
    made.add_weight(base)
    made.add_quantization(base, original.clone())
    made.add_written(computed.clone(), written, base.half())
    return made


def test_norms_shares_and_totals() -> None:
    base, original, update = torch.randn(8, 16), torch.randn(8, 16), torch.zeros(8, 16)
    update[:2] = 1.0
    one, other = figures("a", base, original, update), figures("b", 2 * base, original, 2 * update)
    report = MergeReport("dequantized", "float16", (one, other, TensorFigures("norm", 4, weight=4.0)))
    first, _, norm = report.to_json()["tensors"]
    assert first["weight_norm"] == pytest.approx(float(base.norm()))
    assert first["quantization_error_norm"] == pytest.approx(float((original - base).norm()))
    assert first["update_norm"] == pytest.approx(float(update.norm()))
    assert first["update_over_quantization"] == pytest.approx(float(update.norm() / (original - base).norm()))
    rounding = (base + update).half().float() - (base + update)
    assert first["rounding_error_norm"] == pytest.approx(float(rounding.norm()), rel=1e-4)
    assert first["unmoved_share"] == 0.75
    assert norm["quantization_error_norm"] is norm["update_norm"] is norm["unmoved_share"] is None
    total = report.to_json()["total"]
    assert total["update_norm"] == pytest.approx(float((5 * update.square().sum()).sqrt()))
    assert total["unmoved_share"] == 0.75


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_moved_are_values_that_are_not_equal(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    # The smallest numbers beside zero, and zeros of either sign, which are equal.
    tiny = limits.smallest_normal * limits.eps
    kinds = torch.tensor([0.0, -0.0, tiny, -tiny, 2 * tiny, limits.max, -limits.max, 1.0], dtype=dtype)
    one, other = kinds.repeat_interleave(len(kinds)), kinds.repeat(len(kinds))
    made = TensorFigures("w", one.numel())
    made.add_written(one.float(), one, other)
    assert made.moved == int((one != other).sum()) and 0 < made.moved < one.numel()


def test_the_table() -> None:
    tensor = TensorFigures("layers.0.weight", 100, 400.0, 4.0, 1.0, 0.01, 80)
    text = render(MergeReport("original", "float16", (tensor, TensorFigures("norm", 4, weight=4.0))))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["merged", "into", "the", "original", "base,", "written", "as", "float16"]
    assert ["│", "all", "tensors", "│", "20.1", "│", "2", "│", "1", "│", "0.5", "│", "0.1", "│", "20.00%", "│"] in lines
    assert "layers.0.weight" in text and "norm" not in text.splitlines()[6]
