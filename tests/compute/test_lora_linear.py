"""Tests of the autograd function of a LoRA layer against plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_lite.compute.lora_linear import adapted_linear, apply_mask, draw_seed, dropout_mask, product_dtype


def parts(dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype), torch.randn(6, dtype=dtype)
    a, b = torch.randn(2, 8, dtype=dtype), torch.randn(6, 2, dtype=dtype)
    return x.requires_grad_(), weight, bias.requires_grad_(), a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout: float) -> None:
    x, weight, bias, a, b = parts()

    def y(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(1)
        return adapted_linear(x, weight, bias, a, b, scaling=1.5, dropout=dropout)

    assert torch.autograd.gradcheck(y, (x, bias, a, b))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equals_plain_autograd_with_the_same_mask(dropout: float) -> None:
    x, weight, bias, a, b = parts(torch.float32)
    torch.manual_seed(1)
    ours = adapted_linear(x, weight, bias, a, b, scaling=1.5, dropout=dropout)
    torch.manual_seed(1)
    mask = torch.ones_like(x)
    if dropout:
        mask = dropout_mask(x.reshape(-1, 8), dropout, draw_seed()).view(x.shape).ne(0) / (1 - dropout)
    plain = F.linear(x, weight, bias) + 1.5 * ((x * mask) @ a.T @ b.T)
    torch.testing.assert_close(ours, plain)
    gradient = torch.randn_like(ours)
    inputs = (x, bias, a, b)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, gradient), torch.autograd.grad(plain, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_keeps_x_in_its_own_dtype_and_no_weight() -> None:
    x, weight, bias, a, b = parts(torch.float32)
    half = x.detach().bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        adapted_linear(half, weight, bias, a, b, dropout=0.5)
    shapes = {(tuple(t.shape), t.dtype) for t in kept}
    low = (6, 2), product_dtype(half, None)
    assert shapes == {((6, 8), torch.bfloat16), low, ((2, 8), torch.float32), ((6, 2), torch.float32)}


def test_recomputation_draws_the_same_mask() -> None:
    x, weight, bias, a, b = parts(torch.float32)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(2)

        def y() -> Tensor:
            return adapted_linear(x, weight, bias, a, b, dropout=0.5)

        out = checkpoint(y, use_reentrant=False) if recompute else y()
        gradients.append(torch.autograd.grad(out.sum(), (x, a, b)))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_frozen_inputs_get_no_gradient() -> None:
    x, weight, _, a, b = parts(torch.float32)
    adapted_linear(x.detach(), weight.requires_grad_(), None, a, b.detach()).sum().backward()
    assert x.grad is None and weight.grad is None and b.grad is None and a.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_mask_drops_what_it_says_and_changes_nothing_else(dtype: torch.dtype) -> None:
    x = torch.randn(300, 500).to(dtype)
    mask = dropout_mask(x, 0.2, seed=3)
    kept = apply_mask(x, mask)
    assert torch.equal(kept, torch.where(mask.ne(0), x, 0))
    assert (kept == 0).double().mean() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(mask, dropout_mask(x, 0.2, seed=3)) and not torch.equal(mask, dropout_mask(x, 0.2, seed=4))
