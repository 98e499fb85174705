"""A frozen linear map and its low-rank term with one backward for both.

What plain autograd would do for y = W0 x + s B A x (s: its scaling):
keep x for A, keep A x for B, keep s B A x for the addition, and, when W0 is packed, keep the whole
unpacked W0 until backward. This node keeps x and A x only, and where x came with a recipe (recompute.py) not even x.
W0 is unpacked a second time in backward, which costs far less than holding it; the low-rank term is added into the
product in place; no gradient is formed for anything frozen. Dropout keeps a seed instead of a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._mode_utils import no_dispatch

from qlora_lite.compute.devices import cpu_multiplies_bf16, on_cpu
from qlora_lite.compute.recompute import Recipe, recipe_of
from qlora_lite.compute.slicing import row_slices, rows_that_fit
from qlora_lite.errors import InputError


class Packed(Protocol):
    """A weight that is not a tensor but can be made into one."""

    shape: torch.Size

    def dequantize(self, dtype: torch.dtype) -> Tensor: ...

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor: ...

    @property
    def row_step(self) -> int:
        """A slice of rows must begin at a multiple of this."""

    def own_product(self, rows: Tensor) -> Tensor | None:
        """rows W0^T computed without unpacking; None where it is to be unpacked."""


class Adapted(Protocol):
    """What a kind asks of the layer that it is applied in."""

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
    """y (1 + gain): a sum, since what is near 1 would lose in 16 bits by how much it differs."""
    return torch.addcmul(y, y, gain.to(y.dtype))


def dense(weight: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """The weight as an ordinary tensor of this dtype; the weight itself where it is one already."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


# Freed memory of up to 32 MiB is used again, larger pieces come as fresh pages each time (memory/host.py), which
# costs more than the unpacking: larger weights are unpacked and multiplied in slices of rows of this size.
SLICE_BYTES = 24 << 20


def dense_slices(weight: Tensor | Packed, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight in the dtype of `like` as slices of rows, (which rows, the rows), each made when its turn comes."""
    (rows, columns), dtype = weight.shape, like.dtype
    if isinstance(weight, Tensor) and weight.dtype == dtype:  # nothing is made
        yield slice(0, rows), weight
        return
    step = 1 if isinstance(weight, Tensor) else weight.row_step
    count = rows_that_fit(SLICE_BYTES, columns * dtype.itemsize, step)
    if count >= rows:
        yield slice(0, rows), dense(weight, dtype)
        return
    for part in row_slices(rows, count, like):
        if isinstance(weight, Tensor):
            yield part, weight[part].to(dtype)
        else:
            yield part, weight.dequantize_rows(part.start, part.stop, dtype)


def _product(rows: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
    """rows W0^T + bias, slice by slice of W0."""
    own = None if isinstance(weight, Tensor) else weight.own_product(rows)
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


def _product_back(grad: Tensor, weight: Tensor | Packed) -> Tensor:
    """grad W0, slice by slice of W0."""
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
    """A seed out of torch's default generator, which recomputation under checkpointing rewinds.

    Drawn outside of any dispatch mode: under fake tensors it would have no value.
    """
    with no_dispatch():
        return int(torch.randint(2**62, ()))


# Each row of a dropout mask is the row above it, moved on by so many places.
MASK_SHIFT = 5


INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dropout_mask(like: Tensor, probability: float, seed: int) -> Tensor:
    """All bits zero with this probability, all set elsewhere, in integers of like's size; see `masked`.

    `(rows, width)`, a view: row i begins at place MASK_SHIFT * i of one random string, because drawing a number for
    each entry costs more than the product that the mask is for. Entries of a row are independent; two entries are
    the same one only if they are MASK_SHIFT * n features and n rows apart. The same seed gives the same mask.
    """
    rows, width = like.shape
    string = like.new_empty(MASK_SHIFT * max(rows - 1, 0) + width, dtype=torch.float32)
    generator = None
    if type(like) is Tensor:
        generator = torch.Generator(like.device).manual_seed(seed)
    kept = string.uniform_(generator=generator) >= probability
    return kept.to(INTEGER_OF_SIZE[like.itemsize]).neg_().as_strided((rows, width), (MASK_SHIFT, 1))


def apply_mask(rows: Tensor, mask: Tensor) -> Tensor:
    """The rows where the mask is set, 0 elsewhere: bit by bit, which is three times as fast as a product of floats."""
    return (rows.view(mask.dtype) & mask).view(rows.dtype)


def apply_mask_(rows: Tensor, mask: Tensor) -> Tensor:
    """`masked` in place."""
    rows.view(mask.dtype).bitwise_and_(mask)
    return rows


def product_dtype(x: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """What a product with x is computed in: what is wanted; else x's dtype, or fp32 where that stands in for bf16."""
    if wanted is None and x.dtype == torch.bfloat16 and on_cpu(x.device) and not cpu_multiplies_bf16():
        return torch.float32
    return wanted or x.dtype


class _LowRank(torch.autograd.Function):
    """A (m * x) over rows x, m dropout's zeros and ones; and what `_AdaptedLinear` needs in backward: that, A, B, x.

    Kept by a node of its own, before the product: a block that is computed again for backward ends where the last
    thing to keep is kept, and so spares the last product, a quarter of a transformer block's. No gradient comes
    through here, `_AdaptedLinear` forms them all; its backward comes first, and then this one lets go what was kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, dropout: float, dtype: torch.dtype, recipe: Recipe | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.dropout, ctx.seed, ctx.again = dropout, 0, None
        rows = x.to(dtype)
        if dropout > 0:
            ctx.seed = draw_seed()
            rows = apply_mask(rows, dropout_mask(rows, dropout, ctx.seed))
        low = rows @ lora_A.to(dtype).T
        if recipe is not None:
            ctx.again = recipe.again
            ctx.again.will_read()
        ctx.save_for_backward(low, lora_A, lora_B, *((x,) if recipe is None else recipe.parents))
        return low

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
        return (None,) * 6


class _AdaptedLinear(torch.autograd.Function):
    """y = x W0^T + bias + s (m * x) A^T B^T over rows x; s is scaling / (1 - dropout). Kept: by `_LowRank`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | Packed,
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
            ctx.kept = low.grad_fn
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
            low, lora_A, lora_B, *source = ctx.kept.saved_tensors  # under checkpointing, asking is what recomputes
            x = source[0] if ctx.kept.again is None else ctx.kept.again.read(tuple(source))
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


def check_features(x: object, features: int) -> None:
    """Raises InputError unless x is a tensor of floats with so many features in the last place."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[-1:] != (features,):
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError(f"this layer takes floats with {features} features in the last place; got {got}")


def adapted_linear(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = W0 x + bias + scaling * B A dropout(x), with W0 frozen.

    x `(..., in)`, weight `(out, in)`, bias `(out,)`, lora_A `(rank, in)`, lora_B `(out, rank)` -> `(..., out)`.
    Computed in `compute_dtype` (None: see `product_dtype`), returned in x's dtype; A and B may be of any float dtype.
    Gradients: x, bias, lora_A, lora_B; never the weight. Not twice differentiable.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        # As for torch's own linear; inside, the dtypes are chosen here and must not be changed again.
        x = x.to(torch.get_autocast_dtype(device))
    rows, low = x.reshape(-1, x.shape[-1]), None
    dtype = product_dtype(x, compute_dtype)
    with torch.autocast(device, enabled=False):
        if lora_A is not None and lora_B is not None:
            low = _LowRank.apply(rows, lora_A, lora_B, dropout, dtype, recipe_of(x))
        y: Tensor = _AdaptedLinear.apply(rows, weight, bias, lora_A, lora_B, scaling / (1 - dropout), dtype, low)
    return y.reshape(*x.shape[:-1], y.shape[-1])
