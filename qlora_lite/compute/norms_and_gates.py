"""Norms and gated activations as single nodes that keep their inputs only, in the inputs' own dtype.

Written with torch's operators one by one, an RMSNorm keeps its input twice in fp32, and silu(gate) * up keeps
silu(gate) beside gate and up. Here each keeps what it was given, computes in fp32 in slices of rows, and hands its
output on with a way to recompute it (recompute.py), so that the linear layers after it need not keep that either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lite.compute.recompute import recomputable
from qlora_lite.compute.slicing import slices_within

# Of fp32 temporaries at once: what stays in a core's caches.
SLICE_BYTES = 1 << 20


def _row_slices(rows: Tensor) -> Iterator[slice]:
    return slices_within(rows.shape, torch.float32.itemsize, SLICE_BYTES, like=rows)


def _widened(rows: Tensor) -> Tensor:
    """A copy of the rows in fp32, or in fp64 if that is what they are."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)


def _reciprocal_rms(rows: Tensor, eps: float) -> Tensor:
    return (rows.pow(2).mean(-1, keepdim=True) + eps).rsqrt_()


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)), the quotient in fp32 and then cast to x's dtype. (arXiv:1910.07467)"""
    flat = x.reshape(-1, x.shape[-1])
    out = x.new_empty(x.shape)  # no view of another tensor: routers with jitter change what they get in place
    for part in _row_slices(flat):
        rows = _widened(flat[part])
        out.view(flat.shape)[part] = rows.mul_(_reciprocal_rms(rows, eps))
    return out.mul_(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return normalized(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        flat, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        grad_x = torch.empty_like(flat) if need_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for part in _row_slices(flat):
            rows = _widened(flat[part])
            scale = _reciprocal_rms(rows, ctx.eps)
            rows.mul_(scale)
            if grad_weight is not None:
                grad_weight += (grads[part] * rows.to(x.dtype)).sum(0, dtype=torch.float32)
            if grad_x is not None:
                # d/dx of x r(x), r = 1 / rms: r (g - n mean(g n)) with n = x r.
                slope = _widened(grads[part] * weight)
                inner = (slope * rows).mean(-1, keepdim=True)
                grad_x[part] = slope.sub_(rows.mul_(inner)).mul_(scale)
        found = None if grad_weight is None else grad_weight.to(weight.dtype)
        return None if grad_x is None else grad_x.view(x.shape), found, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`normalized` as one autograd node: x `(..., features)`, weight `(features,)`. Kept for backward: x alone."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return recomputable(y, functools.partial(normalized, eps=eps), x, weight)


class Activation(NamedTuple):
    """A function of one number and its derivative: `slope(grad, x)` is grad * f'(x)."""

    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu_tanh": Activation(
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}


def gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """f(gate) * up for a named activation."""
    return ACTIVATIONS[activation].function(gate).mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated_product(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        function, slope = ACTIVATIONS[ctx.activation]
        grad_up = function(gate).mul_(grad)
        return slope(grad * up, gate), grad_up, None


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """f(gate) * up as one autograd node (arXiv:2002.05202); kept for backward: gate and up, and no third tensor."""
    y: Tensor = _Gated.apply(gate, up, activation)
    return recomputable(y, functools.partial(gated_product, activation=activation), gate, up)
