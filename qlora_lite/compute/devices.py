"""Device and dtype of a model, whether a CPU computes on a tensor and has bf16 instructions, and lack of memory.

A rehearsal predicts for another machine. A CPU build of torch cannot run autograd on fake tensors of an accelerator, so
fake tensors on the CPU stand for them (`accelerator_pretended`), and `on_cpu` is then False.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

_pretended: ContextVar[bool] = ContextVar("whether CPU tensors stand for an accelerator's", default=False)


def on_cpu(device: torch.device) -> bool:
    """Whether a CPU computes on tensors of this device."""
    return device.type == "cpu" and not _pretended.get()


def model_device(model: nn.Module) -> torch.device:
    """Returns the device of the first parameter of a model; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def model_dtype(model: nn.Module) -> torch.dtype:
    """Returns the dtype that a model computes in: that of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)


@contextmanager
def accelerator_pretended() -> Iterator[None]:
    """Makes tensors on the CPU, which must be fake, count as an accelerator's within the block."""
    token = _pretended.set(True)
    try:
        yield
    finally:
        _pretended.reset(token)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the machine ran out of memory; torch reports the latter as a plain RuntimeError.

    oneDNN, which computes torch's products on a CPU, only reports that it could not create a primitive.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    messages = ("can't allocate memory", "could not create a primitive")
    return isinstance(error, RuntimeError) and any(message in str(error) for message in messages)


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 instructions; without them a bf16 product takes ten times as long as an fp32 one."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
