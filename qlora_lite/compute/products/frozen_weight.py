"""Products with a frozen weight W0, dense or packed, which is unpacked a slice of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_lite.compute.devices import cpu_multiplies_bf16, on_cpu
from qlora_lite.compute.slicing import row_slices, rows_that_fit


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


def weight_of(layer: nn.Module) -> Weight:
    """Returns the weight of a linear or embedding layer, a tensor or packed.

    A tensor that is in shares of several processes is gathered first (sharding/base.py): all of them must call this.
    """
    unit: Any = vars(layer).get("unit")
    if unit is not None:
        unit.need()
    weight: Any = layer.weight
    return weight  # type: ignore[no-any-return]


def dequantized(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Returns the weight as a tensor of this dtype: the weight itself if it is one."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


# malloc reuses freed blocks of up to 32 MiB. Larger ones come as fresh pages each time (host_memory.py), which costs
# more than unpacking does. So larger weights are unpacked and multiplied in slices of this size.
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


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the tensor in this dtype, itself or a contiguous copy, in the fewest calls. Without a gradient."""
    return (
        tensor if tensor.dtype == dtype else torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)
    )


def as_matrix(tensor: Tensor) -> Tensor:
    """Returns `(..., features)` as rows, without a call of torch if it is a matrix."""
    if tensor.dim() == 2:
        return tensor
    return tensor.view(-1, tensor.shape[-1]) if tensor.is_contiguous() else tensor.reshape(-1, tensor.shape[-1])


def base_product(rows: Tensor, weight: Weight, bias: Tensor | None, few: bool = False) -> Tensor:
    """Returns rows W0^T + bias `(rows, out)` as a new tensor, slice by slice of W0. few: see `SHORT_PROMPT`."""
    own = None if isinstance(weight, Tensor) else weight.integer_product(rows)
    if own is None and few and not isinstance(weight, Tensor):
        own = weight.few_rows_product(rows)
    if own is not None:
        return own if bias is None else own.add_(bias.to(own.dtype))
    out: Tensor | None = None
    for part, piece in dense_slices(weight, rows):
        if piece.shape[0] == weight.shape[0]:
            return _linear(rows, piece, None if bias is None else cast(bias, rows.dtype))
        if out is None:
            out = rows.new_empty((rows.shape[0], weight.shape[0]))
        out[:, part] = _linear(rows, piece, None if bias is None else cast(bias[part], rows.dtype))
        del piece
    assert out is not None
    return out


def _linear(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of a matrix of rows, with fewer calls; `t()` would be one more than `transpose`."""
    columns = matrix.transpose(0, 1)
    return torch.mm(rows, columns) if bias is None else torch.addmm(bias, rows, columns)


def base_product_back(grad: Tensor, weight: Weight, total: Tensor | None = None) -> Tensor:
    """Returns grad W0 `(rows, in)`, slice by slice of W0; with `total`, it is added to that in place."""
    for part, piece in dense_slices(weight, grad):
        columns = grad if piece.shape[0] == weight.shape[0] else grad[:, part]
        if total is None:
            total = torch.mm(columns, piece)
        else:
            total.addmm_(columns, piece)
        del piece
    assert total is not None
    return total


def product_dtype(x: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """Returns the dtype of a product with x: `wanted`; without one x's, or fp32 on a CPU that cannot multiply bf16."""
    if wanted is None and x.dtype == torch.bfloat16 and on_cpu(x.device) and not cpu_multiplies_bf16():
        return torch.float32
    return wanted or x.dtype
