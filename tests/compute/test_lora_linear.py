"""Tests of the autograd function of a LoRA layer against plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_lite.compute.lora_linear import LinearMap, adapted_linear, adapted_linears
from qlora_lite.compute.products.dropout_mask import draw_seed, dropout_mask
from qlora_lite.compute.products.frozen_weight import product_dtype


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
    assert shapes == {((2, 3, 8), torch.bfloat16), low, ((2, 8), torch.float32), ((6, 2), torch.float32)}


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


def test_maps_of_one_input_are_computed_at_once() -> None:
    """Several ranks, and one map whose output nobody uses."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.double, requires_grad=True)
    maps = []
    for out, rank, biased in ((6, 2, True), (4, 1, False), (5, 3, True)):
        bias = torch.randn(out, dtype=torch.double, requires_grad=True) if biased else None
        lora_A, lora_B = (
            torch.randn(size, dtype=torch.double, requires_grad=True) for size in ((rank, 8), (out, rank))
        )
        maps.append(LinearMap(torch.randn(out, 8, dtype=torch.double), bias, lora_A, lora_B, 0.5 * rank))
    trained = [tensor for one in maps for tensor in one[1:4] if tensor is not None]
    inputs = [x, *trained]
    for used in ((0, 1, 2), (0, 2), (1,)):
        together, apart = adapted_linears(x, maps), [adapted_linear(x, *one[:4], scaling=one.scaling) for one in maps]
        gradients = [
            torch.autograd.grad(sum((y[i].square().sum() for i in used), x.sum()), inputs, allow_unused=True)
            for y in (together, apart)
        ]
        for mine, theirs in zip(*gradients, strict=True):
            assert (mine is None or not mine.any()) if theirs is None else torch.allclose(mine, theirs)
        torch.testing.assert_close(list(together), apart)
