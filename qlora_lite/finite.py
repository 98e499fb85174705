"""NaN, infinity and overflow in weights: found before they are packed or written, and named."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_lite.errors import QuantizationError


def check_finite(tensor: Tensor, name: str, first_row: int = 0) -> float:
    """The largest magnitude. QuantizationError, naming the tensor and the first bad index, for NaN or infinity.

    first_row: where these rows begin in the tensor that has the name.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0.0
    # aminmax hands NaN on and makes no temporary; the tensor is searched only on failure.
    low, high = tensor.detach().aminmax()
    if not (low.isfinite() & high.isfinite()):
        index = tuple(int(i) for i in (~tensor.isfinite()).nonzero()[0])
        value = float(tensor.detach()[index])
        index = (index[0] + first_row, *index[1:]) if index else index
        raise QuantizationError(f"{name} holds {value} at index {index} and cannot be used; repair the checkpoint")
    return float(torch.maximum(high, -low))


def check_packable(weight: Tensor, name: str, format: str, first_row: int = 0) -> None:
    """Raises QuantizationError, naming the tensor, unless it is a matrix of finite floats that the format can hold.

    first_row: where these rows begin in the tensor that has the name.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        got = f"{tuple(weight.shape)} of {weight.dtype}"
        raise QuantizationError(f"{name} must be a matrix of floats to be packed; got {got}")
    if weight.numel() == 0:
        raise QuantizationError(f"{name} has no values: {tuple(weight.shape)}; leave it unpacked (skip_modules)")
    largest, half = check_finite(weight, name, first_row), torch.finfo(torch.float16).max
    if format == "int8" and largest > half:
        raise QuantizationError(f"{name} reaches {largest:g}, above {half:g}, the limit of int8 rows; use nf4")


def cast_finite(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another floating dtype; QuantizationError if a value is, or becomes, NaN or infinite."""
    result = tensor.to(dtype)
    if not result.numel() or torch.stack(result.aminmax()).isfinite().all():
        return result
    if not tensor.isfinite().all():
        raise QuantizationError(f"{name} holds NaN or infinity, which cannot be merged or exported; check the training")
    largest = float(tensor.abs().max())
    limit = torch.finfo(dtype).max
    raise QuantizationError(f"{name} reaches {largest:g}, above {limit:g}, the limit of {dtype}; use bfloat16 instead")
