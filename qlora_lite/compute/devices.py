"""Whether tensors are computed on by a CPU: the one question about devices that code here asks.

A rehearsal answers for another machine: a CPU build of torch cannot run autograd on fake tensors of an accelerator, so
they stand on the CPU and are taken for an accelerator's. Attention then shows outputs and log-sum-exps, as a fused
kernel does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_pretended: ContextVar[bool] = ContextVar("whether CPU tensors stand for an accelerator's", default=False)


def on_cpu(device: torch.device) -> bool:
    """Whether a CPU computes on tensors of this device."""
    return device.type == "cpu" and not _pretended.get()


@contextmanager
def accelerator_pretended() -> Iterator[None]:
    """Within the block, tensors on the CPU are taken for an accelerator's; only fake ones make sense there."""
    token = _pretended.set(True)
    try:
        yield
    finally:
        _pretended.reset(token)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: of an accelerator, or of the machine, which torch tells by a plain RuntimeError.

    oneDNN, which makes torch's products on a CPU, says no more than that it could not create a primitive.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = ("can't allocate memory", "could not create a primitive")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 instructions; without them a bf16 product takes about ten times an fp32 one."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
