"""Checks of settings, names, sizes and tensor values, used by every room."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor

from qlora_lite.errors import ConfigError, QuantizationError

FLOAT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPE_ALIASES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
BYTE_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
CHECKED_AT_ONCE = 32  # tensors that are searched for NaN as one
COUNT_LIMIT = 2**63  # torch's shapes are int64


def dtype_named(name: str) -> torch.dtype:
    """Returns the torch dtype of a name such as `bf16` or `bfloat16`. Raises ConfigError for an unknown name."""
    full = DTYPE_ALIASES.get(name, name)
    if full not in FLOAT_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join((*DTYPE_ALIASES, *FLOAT_DTYPES))}; got {name!r}")
    return FLOAT_DTYPES[full]


def byte_count(what: str, text: str) -> int:
    """Returns the bytes of a size such as `300MiB` or `5GB`. Raises ConfigError, beginning with `what`, otherwise."""
    size = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)", text.strip())
    if size is None or size[2].lower() not in BYTE_UNITS:
        raise ConfigError(f"{what} a size such as 300MiB or 5GB; got {text!r}")
    return int(Fraction(size[1]) * BYTE_UNITS[size[2].lower()])


def require(condition: bool, what: str, got: object) -> None:
    """Raises ConfigError `<what>; got <got>` unless the condition holds."""
    if not condition:
        limit = " and below 2**63" if isinstance(got, int) and got >= COUNT_LIMIT else ""
        raise ConfigError(f"{what}{limit}; got {got!r}")


def is_count(value: object, least: int) -> bool:
    """Whether value is an int (not a bool) from `least` to 2**63 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < COUNT_LIMIT


def is_finite(value: object) -> bool:
    """Whether value is a finite int or float (not a bool)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int above the largest float
        return False


def check_finite(tensor: Tensor, name: str, first_row: int = 0) -> float:
    """Returns the largest magnitude. Raises QuantizationError for NaN or infinity, with name and first bad index.

    first_row: number of the first of these rows in the tensor that has the name.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0.0
    # aminmax propagates NaN and makes no temporary; the tensor is searched only on failure.
    low, high = tensor.detach().aminmax()
    if not (low.isfinite() & high.isfinite()):
        index = tuple(int(i) for i in (~tensor.isfinite()).nonzero()[0])
        value = float(tensor.detach()[index])
        index = (index[0] + first_row, *index[1:]) if index else index
        raise QuantizationError(f"{name} holds {value} at index {index} and cannot be used; repair the checkpoint")
    return float(torch.maximum(high, -low))


def cast_finite(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Returns the tensor in another float dtype. Raises QuantizationError if a value is or becomes NaN or infinite."""
    result = tensor.to(dtype)
    if not result.numel() or torch.stack(result.aminmax()).isfinite().all():
        return result
    if not tensor.isfinite().all():
        raise QuantizationError(f"{name} holds NaN or infinity, which cannot be merged or exported; check the training")
    largest = float(tensor.abs().max())
    limit = torch.finfo(dtype).max
    raise QuantizationError(f"{name} reaches {largest:g}, above {limit:g}, the limit of {dtype}; use bfloat16 instead")


@torch.no_grad()
def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether no value is NaN or infinite: the largest magnitude of each is finite then."""
    values = [tensor.view(-1) for tensor in tensors]
    starts = range(0, len(values), CHECKED_AT_ONCE)
    largest = [torch.cat(values[start : start + CHECKED_AT_ONCE]).norm(math.inf) for start in starts]
    return bool(torch.stack(largest).isfinite().all())
