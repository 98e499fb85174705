"""The tensors in nested values, and the storages behind a tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_COMPRESSED_ROWS = ("crow_indices", "col_indices", "values")
_COMPRESSED_COLUMNS = ("ccol_indices", "row_indices", "values")
SPARSE_PARTS: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _COMPRESSED_ROWS,
    torch.sparse_bsr: _COMPRESSED_ROWS,
    torch.sparse_csc: _COMPRESSED_COLUMNS,
    torch.sparse_bsc: _COMPRESSED_COLUMNS,
}


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yields the tensors in a value that may nest them in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def storages_of(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Yields the storages of a tensor: one if it is dense, those of its parts if it is sparse or wraps other tensors.

    A tensor on meta has none, nor has one of an opaque layout (MKL-DNN).
    """
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages_of(getattr(tensor, name))
    elif tensor.layout in SPARSE_PARTS:
        for name in SPARSE_PARTS[tensor.layout]:
            yield from storages_of(getattr(tensor, name)())
    # A fake tensor has the device that it stands for, so it is not excluded here.
    elif tensor.layout is torch.strided and _device_of(tensor).type != "meta":
        yield tensor.untyped_storage()


def _device_of(tensor: Tensor) -> torch.device:
    """`tensor.device`, which for a fake tensor would pass through all dispatch modes: half of the time of a trace."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
