"""A frozen linear map and its low-rank term in one autograd function.

For y = W0 x + s B A x, plain autograd keeps x for A, A x for B, s B A x for the sum, and the whole unpacked W0 if W0 is
packed. The function here keeps x and A x only, and not even x where it can be recomputed (recompute.py). W0 is
unpacked a second time in backward, which costs far less time than its memory is worth. The low-rank term is added into
the product in place. Nothing frozen gets a gradient. Dropout keeps a seed instead of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_lite.compute.products.dropout_mask import apply_mask, apply_mask_, draw_seed, dropout_mask
from qlora_lite.compute.products.frozen_weight import (
    Weight,
    as_matrix,
    base_product,
    base_product_back,
    cast,
    product_dtype,
)
from qlora_lite.compute.recompute import Recomputation, recomputation_of, saving_node
from qlora_lite.errors import InputError

Factors = tuple[Tensor, Tensor]  # A and B


class AdaptedLayer(Protocol):
    """The attributes of a LoraLayer that a kind reads."""

    @property
    def base_layer(self) -> nn.Module: ...

    @property
    def scaling(self) -> float: ...

    @property
    def bias(self) -> Tensor | None: ...

    in_features: int
    dropout: float
    training: bool


def with_gain(y: Tensor, gain: Tensor) -> Tensor:
    """Returns y (1 + gain), as y + y gain: in 16 bits a factor near 1 would lose its difference from 1."""
    return torch.addcmul(y, y, gain.to(y.dtype))


class LinearMap(NamedTuple):
    """y = W0 x + bias + scaling * B A x, with W0 frozen; A and B are both there, or neither."""

    weight: Weight
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Returns the matrices below each other, in this dtype."""
    return cast(matrices[0] if len(matrices) == 1 else torch.cat(list(matrices)), dtype)


def _scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Returns scaling * left right, with the scaling in the product."""
    out = torch.empty((left.shape[0], right.shape[1]), dtype=left.dtype, device=left.device)
    return out.addmm_(left, right, beta=0, alpha=scaling)


class _LowRank(torch.autograd.Function):
    """low = (m * x) A^T `(rows, ranks)`, for rows of x `(..., in)`, a dropout mask m of zeros and ones, stacked A's.

    Saves low, the A's and B's, and x for the backward of `_AdaptedLinear`, which computes all gradients; none passes
    through here. The two are separate nodes because recomputation of a checkpointed block stops once all saved tensors
    are made. With the tensors saved before the product, the last product of a block, a quarter of its work, is not
    computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropout: float, dtype: torch.dtype, again: Recomputation | None, *factors: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.dropout, ctx.seed, ctx.shared = dropout, 0, None
        rows = cast(as_matrix(x), dtype)
        if dropout > 0:
            ctx.seed = draw_seed()
            rows = apply_mask(rows, dropout_mask(rows, dropout, ctx.seed))
        low = torch.mm(rows, _stacked(factors[::2], dtype).transpose(0, 1))
        if again is not None:
            ctx.shared = again.result
            ctx.shared.expect_reader()
        ctx.save_for_backward(low, *factors, *((x,) if again is None else again.inputs))
        return low

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _AdaptedLinear(torch.autograd.Function):
    """y = x W0^T + bias + s low B^T for several maps of one x, with low of `_LowRank` and s = scaling / (1 - dropout).

    x `(..., in)`, W0 `(out, in)`, A `(rank, in)`, B `(out, rank)`, y and its gradient G `(..., out)`. The gradients:

        x       the sum over the maps of G W0 + m * (s G B A)
        A       (s G B)^T (m * x)
        B       s G^T low
        bias    the sum of G over its rows

    The A's of all maps are multiplied at once, as one matrix. flat: bias, A and B of each map.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        maps: Sequence[LinearMap],
        dtype: torch.dtype,
        low: Tensor | None,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.frozen, ctx.dtype = [(one.weight, one.scaling) for one in maps], dtype
        ctx.kept = None if low is None else saving_node(low)
        ctx.ranks = [0 if one.lora_A is None else one.lora_A.shape[0] for one in maps]
        rows, first, found = cast(as_matrix(x), dtype), 0, []
        for one, rank in zip(maps, ctx.ranks, strict=True):
            y = base_product(rows, one.weight, one.bias)
            if low is not None and one.lora_B is not None:
                part = low if rank == low.shape[1] else low[:, first : first + rank]
                y.addmm_(part, cast(one.lora_B, dtype).transpose(0, 1), alpha=one.scaling)
                first += rank
            shape = (*x.shape[:-1], y.shape[1])
            # Not a view in the eyes of autograd: models (Falcon) add to it in place.
            found.append(torch.ops.aten._unsafe_view.default(cast(y, x.dtype), shape))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        need_x, _, _, _, *needed = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(needed)
        given = [None if grad is None else as_matrix(grad) for grad in grads]
        if all(grad is None for grad in given):
            return (None,) * len(ctx.needs_input_grad)
        x_dtype = next(grad.dtype for grad in grads if grad is not None)
        x_shape = next(grad.shape[:-1] for grad in grads if grad is not None)
        grad_x: Tensor | None = None
        for index, grad in enumerate(given):
            if grad is None:
                continue
            given[index] = grad = cast(grad, ctx.dtype)
            if need_x:
                grad_x = base_product_back(grad, ctx.frozen[index][0], grad_x)
            if needed[3 * index]:
                found[3 * index] = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
        if ctx.kept is not None:
            _low_rank_gradients(ctx, given, grad_x, needed, found)
        grad_x = None if grad_x is None else cast(grad_x, x_dtype).view(*x_shape, -1)
        return grad_x, None, None, None, *found


def _low_rank_gradients(
    ctx: Any, grads: Sequence[Tensor | None], grad_x: Tensor | None, needed: Sequence[bool], found: list[Tensor | None]
) -> None:
    """Adds the part of the low-rank terms to the gradient of x, and writes those of A and B into `found`."""
    low, *saved = ctx.kept.saved_tensors  # under checkpointing, reading them recomputes
    factors, source = saved[: 2 * len(grads)], tuple(saved[2 * len(grads) :])
    x = source[0] if ctx.kept.shared is None else ctx.kept.shared.read(source)
    rows = cast(as_matrix(x), ctx.dtype)
    lows = [low] if len(grads) == 1 else low.split(ctx.ranks, 1)
    slopes = []
    for index, (grad, part, (_, scaling)) in enumerate(zip(grads, lows, ctx.frozen, strict=True)):
        lora_B = factors[2 * index + 1]
        slopes.append(
            torch.zeros_like(part) if grad is None else _scaled_product(grad, cast(lora_B, ctx.dtype), scaling)
        )
        if grad is not None and needed[3 * index + 2]:
            found[3 * index + 2] = cast(_scaled_product(grad.transpose(0, 1), part, scaling), lora_B.dtype)
    slope = slopes[0] if len(slopes) == 1 else torch.cat(slopes, 1)
    mask = dropout_mask(rows, ctx.kept.dropout, ctx.kept.seed) if ctx.kept.dropout > 0 else None
    if grad_x is not None:
        stacked = _stacked(factors[::2], ctx.dtype)
        if mask is None:
            grad_x.addmm_(slope, stacked)
        else:
            grad_x.add_(apply_mask_(torch.mm(slope, stacked), mask))
    if any(needed[1::3]):
        grad_A = cast(
            torch.mm(slope.transpose(0, 1), rows if mask is None else apply_mask(rows, mask)), factors[0].dtype
        )
        for index, part in enumerate(grad_A.split(ctx.ranks)):
            if needed[3 * index + 1]:
                found[3 * index + 1] = cast(part, factors[2 * index].dtype)


# The most rows for kernels of few rows, and without nodes for autograd (copied 4-bit codes take these). On an AMD EPYC
# (Zen 4) they take 0.2 of the time of unpacking with 1 row, 0.8 with 32; with 128 copied codes 1.1, and int8 codes 2.
FEW_ROWS = 32
SHORT_PROMPT = 128


def _few_rows_linear(x: Tensor, one: LinearMap, dtype: torch.dtype) -> Tensor:
    """Returns `_AdaptedLinear`'s y without its nodes, which cost more time than a product of few rows."""
    rows = as_matrix(x)
    y = base_product(cast(rows, dtype), one.weight, one.bias, few=True)
    if one.lora_A is not None and one.lora_B is not None:
        add_few_rows_update_(y, rows, (one.lora_A, one.lora_B), one.scaling)
    return cast(y, x.dtype).view(*x.shape[:-1], -1)


def add_few_rows_update_(y: Tensor, x: Tensor, lora: Factors, scaling: float) -> None:
    """Adds scaling * B A x to the product y `(rows, out)` of few rows x `(rows, in)`."""
    lora_A, lora_B = lora
    # Factors in fp32 as they are: for few rows, casts would take longer.
    if len(y) <= FEW_ROWS and lora_A.dtype == lora_B.dtype == torch.float32 != y.dtype:
        y.add_(F.linear(F.linear(x.to(torch.float32), lora_A), lora_B), alpha=scaling)
    else:
        y.addmm_(x.to(y.dtype) @ lora_A.to(y.dtype).T, lora_B.to(y.dtype).T, alpha=scaling)


def check_features(x: object, features: int) -> None:
    """Raises InputError unless x is a tensor of floats whose last dimension is `features`."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[-1:] != (features,):
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError(f"this layer takes floats with {features} features in the last dimension; got {got}")


def adapted_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns W0 x + bias + scaling * B A dropout(x) `(..., out)`, with W0 frozen.

    x `(..., in)`, weight W0 `(out, in)`, bias `(out,)`, lora_A `(rank, in)`, lora_B `(out, rank)`. A and B may have any
    float dtype. The products are computed in `compute_dtype` (None: `product_dtype`), and the result has x's dtype.
    x, bias, lora_A and lora_B get gradients, the weight does not. Not twice differentiable.
    """
    one = LinearMap(weight, bias, lora_A, lora_B, scaling)
    return adapted_linears(x, (one,), dropout=dropout, compute_dtype=compute_dtype)[0]


def hand_out(x: Tensor, outputs: dict[int, Tensor]) -> None:
    """Attaches to x the outputs of several layers for it, by the ids of the layers."""
    x.outputs = x._version, outputs  # type: ignore[attr-defined]


def taken_output(x: Any, layer: object) -> Tensor | None:
    """Returns the output that was handed out for this layer, once; None if there is none or x was changed since."""
    found: tuple[int, dict[int, Tensor]] | None = getattr(x, "outputs", None)
    return None if found is None or found[0] != x._version else found[1].pop(id(layer), None)


def take_back(x: Any) -> None:
    """Drops the outputs that nobody took."""
    if getattr(x, "outputs", None) is not None:
        del x.outputs


def adapted_linears(
    x: Tensor, maps: Sequence[LinearMap], *, dropout: float = 0.0, compute_dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Returns `adapted_linear` of each map for one x, which all of them read at once.

    Either all maps have A and B, or none has. Dropout is for one map alone.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        # As for torch's own linear; inside, the dtypes are chosen here and must not be changed again.
        x = x.to(torch.get_autocast_dtype(device))
    dtype = product_dtype(x, compute_dtype)
    flat = [tensor for one in maps for tensor in one[1:4]]
    factors = [tensor for one in maps for tensor in one[2:4] if tensor is not None]
    few = x.numel() <= SHORT_PROMPT * x.shape[-1] and type(x) is Tensor and dropout == 0
    if few and torch.is_grad_enabled():
        few = not any(t is not None and t.requires_grad for t in (x, *flat))
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        if few:
            return tuple(_few_rows_linear(x, one, dtype) for one in maps)
        low = None
        if factors:
            low = _LowRank.apply(x, dropout, dtype, recomputation_of(x), *factors)
            maps = [one._replace(scaling=one.scaling / (1 - dropout)) for one in maps] if dropout else maps
        found: tuple[Tensor, ...] = _AdaptedLinear.apply(x, maps, dtype, low, *flat)
    return found
