"""RMSNorm and gated activations as single autograd nodes that keep only their inputs, in the inputs' dtype.

    RMSNorm      y = w * x / sqrt(mean(x^2) + eps)       (arXiv:1910.07467)
    gated        y = f(g) * u                            (arXiv:2002.05202; f: SiLU or GELU)

Composed of torch's operators, an RMSNorm keeps its input twice in fp32, and silu(g) * u keeps silu(g) next to g and u.
Each node here keeps its inputs, computes in fp32 in slices of rows, and marks its output as recomputable
(recompute.py), so that the linear layers that read it need not keep it either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._mode_utils import no_dispatch

from qlora_lite.compute.products.frozen_weight import as_matrix, cast
from qlora_lite.compute.recompute import recomputable
from qlora_lite.compute.slicing import rows_in, slices_within

PROBE_SHAPE = (3, 16)
MLP_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
EPS_NAMES = ("variance_epsilon", "eps")
# Bytes of fp32 temporaries at once, which stay in the caches of a core.
SLICE_BYTES = 5 << 19


class _Slice(NamedTuple):
    """Some rows of a matrix, and buffers of their shape in fp32, or in fp64 for fp64 rows, shared by all slices."""

    part: slice
    rows: Tensor
    buffers: list[Tensor]


def _slices(flat: Tensor, buffers: int) -> Iterator[_Slice]:
    """Yields the rows of a matrix in slices that fit into `SLICE_BYTES`; the last one may be shorter."""
    shared: list[Tensor] = []
    for part in slices_within(flat.shape, torch.float32.itemsize, SLICE_BYTES, like=flat):
        rows = rows_in(flat, part)
        if not shared:
            shared = [torch.empty(rows.shape, dtype=_wide(flat.dtype), device=flat.device) for _ in range(buffers)]
        elif len(rows) < len(shared[0]):
            shared = [buffer[: len(rows)] for buffer in shared]
        yield _Slice(part, rows, shared)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _constants(eps: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns eps and the number of features without dimensions: torch makes a tensor of a number in each call."""
    numbers = eps, like.shape[-1]
    first, second = (torch.full((), number, dtype=_wide(like.dtype), device=like.device) for number in numbers)
    return first, second


def _reciprocal_rms(rows: Tensor, spare: Tensor, constants: tuple[Tensor, Tensor]) -> Tensor:
    """Returns 1 / sqrt(mean(rows^2) + eps); overwrites `spare`."""
    eps, features = constants
    return torch.addcdiv(eps, torch.mul(rows, rows, out=spare).sum(-1, keepdim=True), features).rsqrt_()


@torch.no_grad()
def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns weight * (x / sqrt(mean(x^2) + eps)), the quotient computed in fp32 and cast to x's dtype."""
    flat = as_matrix(x)
    # Not a view: routers with jitter change their input in place.
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_rows, constants = as_matrix(out), _constants(eps, x)
    for part, rows, (wide, spare) in _slices(flat, 2):
        scale = _reciprocal_rms(wide.copy_(rows), spare, constants)
        rows_in(out_rows, part).copy_(wide.mul_(scale))
    return out.mul_(weight)


class _RMSNorm(torch.autograd.Function):
    """y = w n with n = x r, r = 1 / sqrt(mean(x^2) + eps), over rows x `(..., features)`, w `(features,)`.

    dw = sum over rows of dy * n
    dx = r (h - n mean(h n)) with h = dy * w
    """

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
        flat, grads = as_matrix(x), as_matrix(grad)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        constants, wide_weight = _constants(ctx.eps, x), cast(weight, _wide(x.dtype))
        for part, rows, (wide, slope, spare) in _slices(flat, 3):
            scale = _reciprocal_rms(wide.copy_(rows), spare, constants)
            wide.mul_(scale)
            grad_rows = rows_in(grads, part)
            if grad_weight is not None:
                grad_weight += (grad_rows * wide.to(x.dtype)).sum(0, dtype=torch.float32)
            if grad_x is not None:
                slope.copy_(grad_rows).mul_(wide_weight)
                inner = torch.mul(slope, wide, out=spare).sum(-1, keepdim=True)
                slope.addcmul_(wide, inner, value=-1 / x.shape[-1]).mul_(scale)
                rows_in(as_matrix(grad_x), part).copy_(slope)
        found = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_x, found, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns `normalized(x, weight, eps)` as one autograd node: x `(..., features)`, weight `(features,)`.

    Kept for backward: x and the weight. Gradients: x and weight.
    """
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return recomputable(y, functools.partial(normalized, eps=eps), x, weight)


class Activation(NamedTuple):
    """An elementwise function f and its derivative: `slope(grad, x)` is grad * f'(x)."""

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
    """Returns f(gate) * up for the activation f of this name in ACTIVATIONS."""
    return ACTIVATIONS[activation].function(gate).mul_(up)


class _Gated(torch.autograd.Function):
    """y = f(g) * u:  dg = dy * u * f'(g),  du = dy * f(g)."""

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
    """Returns f(gate) * up as one autograd node; gate, up and the result have the same shape.

    Kept for backward: gate and up.
    """
    y: Tensor = _Gated.apply(gate, up, activation)
    return recomputable(y, functools.partial(gated_product, activation=activation), gate, up)


def gives(forward: Callable[[], object], expected: Tensor) -> bool:
    """Returns whether a forward runs on its stand-in module and gives exactly this tensor."""
    try:
        result = forward()
    except Exception:  # the code of a model may fail on the stand-in in any way
        return False
    return isinstance(result, Tensor) and result.dtype == expected.dtype and torch.equal(result, expected)


def probe(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Returns the small random tensor of this seed that modules are tried on."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_eps(module: nn.Module) -> float | None:
    """Returns the eps of a module that computes `normalized` with its weight; None for any other module."""
    weight = module._parameters.get("weight")
    name = next((name for name in EPS_NAMES if hasattr(module, name)), None)
    if weight is None or weight.dim() != 1 or name is None or module._parameters.get("bias") is not None:
        return None
    eps: Any = getattr(module, name)
    with no_dispatch(), torch.no_grad():
        x, scale = probe(0, weight.dtype, *PROBE_SHAPE), probe(1, weight.dtype, PROBE_SHAPE[-1])
        stand_in: Any = SimpleNamespace(weight=scale, **{name: eps})
        same = gives(lambda: type(module).forward(stand_in, x), normalized(x, scale, eps))
    return float(eps) if same else None


def mlp_activation(module: nn.Module, dtype: torch.dtype) -> str | None:
    """Returns the activation f of a module that computes down(f(gate(x)) * up(x)); None for any other module."""
    if not all(isinstance(getattr(module, part, None), nn.Module) for part in MLP_PARTS):
        return None
    with no_dispatch(), torch.no_grad():
        x = probe(0, dtype, *PROBE_SHAPE)
        stand_in: Any = SimpleNamespace(
            gate_proj=torch.sin, up_proj=torch.cos, down_proj=torch.tan, act_fn=module.act_fn
        )
        for name in ACTIVATIONS:
            expected = torch.tan(gated_product(torch.sin(x), torch.cos(x), name))
            if gives(lambda: type(module).forward(stand_in, x), expected):
                return name
    return None


def short_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns `normalized` up to the order of its sum, in two operations: for rows so few that their number counts."""
    return F.rms_norm(x, weight.shape, None, eps) * weight
