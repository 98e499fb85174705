"""A frozen linear map and its low-rank term in one autograd function.

For y = W0 x + s B A x, plain autograd keeps x for A, A x for B, s B A x for the sum, and the whole unpacked W0 if W0 is
packed. The function here keeps x and A x only, and not even x where it can be recomputed (recompute.py). W0 is
unpacked a second time in backward, which costs far less time than its memory is worth. The low-rank term is added into
the product in place. Nothing frozen gets a gradient. Dropout keeps a seed instead of a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._mode_utils import no_dispatch

from qlora_lite.compute.devices import cpu_multiplies_bf16, on_cpu
from qlora_lite.compute.recompute import Recomputation, recomputation_of, saving_node
from qlora_lite.compute.slicing import row_slices, rows_that_fit
from qlora_lite.errors import InputError


class PackedMatrix(Protocol):
    """A packed weight `(out, in)`, which can be unpacked whole or by rows."""

    shape: torch.Size

    @property
    def device(self) -> torch.device: ...

    def dequantize(self, dtype: torch.dtype) -> Tensor: ...

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor: ...

    @property
    def row_step(self) -> int:
        """A slice of rows has to start at a multiple of this."""

    def integer_product(self, rows: Tensor) -> Tensor | None:
        """Returns rows W0^T computed in integers, or None if they were not asked for or the shapes do not suit."""

    def few_rows_product(self, rows: Tensor) -> Tensor | None:
        """Returns rows W0^T for few rows, as a new tensor, or None if the weight has to be unpacked."""


Weight = Tensor | PackedMatrix
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


def weight_of(layer: nn.Module) -> Weight:
    """Returns the weight of a linear or embedding layer, a tensor or packed."""
    return cast("Weight", layer.weight)


def dequantized(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Returns the weight as a tensor of this dtype: the weight itself if it is one."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


# Larger weights are unpacked and multiplied in slices of this size: malloc reuses freed blocks of up to 32 MiB, and
# takes fresh pages for larger ones each time (host_memory.py), which costs more than unpacking.
SLICE_BYTES = 24 << 20


def dense_slices(weight: Weight, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields (slice of rows, these rows in the dtype of `like`) over the weight. Rows are unpacked when asked for."""
    (rows, columns), dtype = weight.shape, like.dtype
    if isinstance(weight, Tensor) and weight.dtype == dtype:  # the whole weight costs nothing
        yield slice(0, rows), weight
        return
    step = 1 if isinstance(weight, Tensor) else weight.row_step
    count = rows_that_fit(SLICE_BYTES, columns * dtype.itemsize, step)
    if count >= rows:
        yield slice(0, rows), dequantized(weight, dtype)
        return
    for part in row_slices(rows, count, like):
        if isinstance(weight, Tensor):
            yield part, weight[part].to(dtype)
        else:
            yield part, weight.dequantize_rows(part.start, part.stop, dtype)


def _product(rows: Tensor, weight: Weight, bias: Tensor | None, few: bool = False) -> Tensor:
    """Returns rows W0^T + bias `(rows, out)` as a new tensor, slice by slice of W0. few: see `SHORT_PROMPT`."""
    own = None if isinstance(weight, Tensor) else weight.integer_product(rows)
    if own is None and few and not isinstance(weight, Tensor):
        own = weight.few_rows_product(rows)
    if own is not None:
        return own if bias is None else own.add_(bias.to(own.dtype))
    out = rows.new_empty(0)
    for part, piece in dense_slices(weight, rows):
        offset = None if bias is None else bias[part].to(rows.dtype)
        if piece.shape[0] == weight.shape[0]:
            return F.linear(rows, piece, offset)
        if not out.numel():
            out = rows.new_empty((rows.shape[0], weight.shape[0]))
        out[:, part] = F.linear(rows, piece, offset)
        del piece
    return out


def _product_back(grad: Tensor, weight: Weight) -> Tensor:
    """Returns grad W0 `(rows, in)`, slice by slice of W0."""
    total: Tensor | None = None
    for part, piece in dense_slices(weight, grad):
        if total is None:
            total = grad[:, part] @ piece
        else:
            total.addmm_(grad[:, part], piece)
        del piece
    assert total is not None
    return total


def draw_seed() -> int:
    """Draws a seed from torch's default generator, which recomputation under checkpointing rewinds.

    It is drawn outside of any dispatch mode, because fake tensors would give it no value.
    """
    with no_dispatch():
        return int(torch.randint(2**62, ()))


MASK_SHIFT = 5  # each row of a dropout mask is the row above it, shifted by this many entries
INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dropout_mask(like: Tensor, probability: float, seed: int) -> Tensor:
    """Returns a dropout mask `(rows, width)` for `apply_mask`: integers as wide as like's values.

    An entry has no bit set with this probability, else all bits. The same seed gives the same mask. The mask is a view
    of one random string, because drawing a number for each entry costs more than the product that the mask is for: row
    i starts at entry MASK_SHIFT * i. Entries of a row are independent. Two entries share their number only if they are
    n rows and MASK_SHIFT * n columns apart.
    """
    rows, width = like.shape
    string = like.new_empty(MASK_SHIFT * max(rows - 1, 0) + width, dtype=torch.float32)
    generator = torch.Generator(like.device).manual_seed(seed) if type(like) is Tensor else None
    kept = string.uniform_(generator=generator) >= probability
    return kept.to(INTEGER_OF_SIZE[like.itemsize]).neg_().as_strided((rows, width), (MASK_SHIFT, 1))


def apply_mask(rows: Tensor, mask: Tensor) -> Tensor:
    """Returns the rows with 0 where the mask is 0. The bitwise product is three times as fast as one of floats."""
    return (rows.view(mask.dtype) & mask).view(rows.dtype)


def apply_mask_(rows: Tensor, mask: Tensor) -> Tensor:
    """`masked` in place."""
    rows.view(mask.dtype).bitwise_and_(mask)
    return rows


def product_dtype(x: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """Returns the dtype of a product with x: `wanted`; without one x's, or fp32 on a CPU that cannot multiply bf16."""
    if wanted is None and x.dtype == torch.bfloat16 and on_cpu(x.device) and not cpu_multiplies_bf16():
        return torch.float32
    return wanted or x.dtype


class _LowRank(torch.autograd.Function):
    """low = (m * x) A^T `(rows, rank)`, for rows x `(rows, in)` and a dropout mask m of zeros and ones.

    Saves low, A, B and x for the backward of `_AdaptedLinear`, which computes all gradients; none passes through here.
    The two are separate nodes because recomputation of a checkpointed block stops once all saved tensors are made. With
    the tensors saved before the product, the last product of a block, a quarter of its work, is not computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        dropout: float,
        dtype: torch.dtype,
        again: Recomputation | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.dropout, ctx.seed, ctx.shared = dropout, 0, None
        rows = x.to(dtype)
        if dropout > 0:
            ctx.seed = draw_seed()
            rows = apply_mask(rows, dropout_mask(rows, dropout, ctx.seed))
        low = rows @ lora_A.to(dtype).T
        if again is not None:
            ctx.shared = again.result
            ctx.shared.expect_reader()
        ctx.save_for_backward(low, lora_A, lora_B, *((x,) if again is None else again.inputs))
        return low

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
        return (None,) * 6


class _AdaptedLinear(torch.autograd.Function):
    """y = x W0^T + bias + s low B^T, with low = (m * x) A^T of `_LowRank` and s = scaling / (1 - dropout).

    x `(rows, in)`, W0 `(out, in)`, A `(rank, in)`, B `(out, rank)`, y and its gradient G `(rows, out)`. The gradients:

        x       G W0 + m * (s G B A)
        A       (s G B)^T (m * x)
        B       s G^T low
        bias    the sum of G over its rows
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        dtype: torch.dtype,
        low: Tensor | None,
    ) -> Tensor:
        y = _product(x.to(dtype), weight, bias)
        ctx.weight, ctx.scaling, ctx.dtype, ctx.kept = weight, scaling, dtype, None
        if low is not None and lora_B is not None:
            ctx.kept = saving_node(low)
            y.addmm_(low, lora_B.to(dtype).T, alpha=scaling)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, need_bias, need_A, need_B, *_ = ctx.needs_input_grad
        x_dtype, grad = grad.dtype, grad.to(ctx.dtype)
        grad_x = _product_back(grad, ctx.weight) if need_x else None
        grad_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)) if need_bias else None
        grad_A = grad_B = None
        if ctx.kept is not None:
            low, lora_A, lora_B, *source = ctx.kept.saved_tensors  # under checkpointing, reading them recomputes
            x = source[0] if ctx.kept.shared is None else ctx.kept.shared.read(tuple(source))
            rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            grad_low = (grad @ lora_B.to(ctx.dtype)).mul_(ctx.scaling)
            grad_B = (low.T @ grad).T.to(lora_B.dtype).mul_(ctx.scaling) if need_B else None
            mask = None
            if ctx.kept.dropout > 0:
                mask = dropout_mask(rows, ctx.kept.dropout, ctx.kept.seed)
            if grad_x is not None and mask is None:
                grad_x.addmm_(grad_low, lora_A.to(ctx.dtype))
            elif grad_x is not None:
                grad_x.add_(apply_mask_(grad_low @ lora_A.to(ctx.dtype), cast(Tensor, mask)))
            if need_A:
                dropped = rows if mask is None else apply_mask(rows, mask)
                grad_A = (grad_low.T @ dropped).to(lora_A.dtype)
        grad_x = None if grad_x is None else grad_x.to(x_dtype)
        return grad_x, None, grad_bias, grad_A, grad_B, None, None, None


# The most rows for kernels of few rows, and without nodes for autograd (copied 4-bit codes take these). On an AMD EPYC
# (Zen 4) they take 0.2 of the time of unpacking with 1 row, 0.8 with 32; with 128 copied codes 1.1, and int8 codes 2.
FEW_ROWS = 32
SHORT_PROMPT = 128


def _few_rows_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, lora: Factors | None, scaling: float, dtype: torch.dtype
) -> Tensor:
    """Returns `_AdaptedLinear`'s y without its nodes, which cost more time than a product of few rows."""
    y = _product(x.to(dtype), weight, bias, few=True)
    if lora is not None:
        add_few_rows_update_(y, x, lora, scaling)
    return y.to(x.dtype)


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
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        # As for torch's own linear; inside, the dtypes are chosen here and must not be changed again.
        x = x.to(torch.get_autocast_dtype(device))
    rows, low = x.reshape(-1, x.shape[-1]), None
    dtype = product_dtype(x, compute_dtype)
    lora = None if lora_A is None or lora_B is None else (lora_A, lora_B)
    few = rows.shape[0] <= SHORT_PROMPT and type(rows) is Tensor and dropout == 0
    if few and torch.is_grad_enabled():
        few = not any(t is not None and t.requires_grad for t in (x, bias, lora_A, lora_B))
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        if few:
            return _few_rows_linear(rows, weight, bias, lora, scaling, dtype).view(*x.shape[:-1], -1)
        if lora is not None:
            low = _LowRank.apply(rows, *lora, dropout, dtype, recomputation_of(x))
        y: Tensor = _AdaptedLinear.apply(rows, weight, bias, lora_A, lora_B, scaling / (1 - dropout), dtype, low)
    return y.reshape(*x.shape[:-1], y.shape[-1])
