"""Tests of packed layers: no unpacked weight is kept, the dtype follows the model, products run in slices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qlora_lite.errors import InputError, QuantizationError
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight


def test_linear_keeps_no_unpacked_weight_for_backward() -> None:
    layer = QuantizedLinear(PackedWeight.of(torch.randn(16, 64), QuantConfig()))
    x = torch.randn(4, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = layer(x)
    y.sum().backward()
    assert not kept
    torch.testing.assert_close(x.grad, layer.weight.dequantize(torch.float32).sum(0).expand(4, 64))
    with pytest.raises(InputError, match="64 features"):
        layer(torch.randn(4, 32))


def test_embedding_follows_the_models_dtype() -> None:
    rows = PackedWeight.of(torch.randn(10, 8), QuantConfig(format="int8"))
    embedding = QuantizedEmbedding(rows, torch.float32).to(torch.bfloat16)
    assert embedding(torch.tensor([1])).dtype == torch.bfloat16
    with pytest.raises(QuantizationError, match="as int8"):
        QuantizedEmbedding(PackedWeight.of(torch.randn(8, 64), QuantConfig()), torch.float32)


def test_large_weights_are_multiplied_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(PackedWeight.of(torch.randn(50, 64), QuantConfig()), nn.Parameter(torch.randn(50)))
    x = torch.randn(7, 64, requires_grad=True)
    whole = layer(x)
    (grad,) = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr("qlora_lite.compute.products.frozen_weight.SLICE_BYTES", 4 * 64 * 9)
    sliced = layer(x)
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(torch.autograd.grad(sliced.square().sum(), x)[0], grad, rtol=1e-4, atol=1e-3)
