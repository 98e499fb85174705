"""What kernels of a CUDA device allocate inside themselves, which no trace of tensors sees: one function, with sources.

Rehearsals for such a device run on fake CPU tensors (devices.py), so the operators named here are the CPU's; each
stands for the one that a CUDA device would run in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FP32_BYTES = 4
# Rows of queries are handled 128 at a time, heads in widths of 32 (FlashAttention-2, csrc/flash_attn/flash_api.cpp).
ROUND_ROWS = 128
ROUND_HEAD = 32


def _rounded(value: int, to: int) -> int:
    return -(-value // to) * to


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> int:
    """FlashAttention-2's backward: sums of dq and of softmax rows in fp32; dk and dv of each query head, if shared."""
    batch, heads, tokens, width = query.shape
    rows = batch * heads * _rounded(tokens, ROUND_ROWS)
    shared = 0
    if key.shape[1] != heads:
        shared = batch * heads * key.shape[2] * (width + value.shape[-1]) * key.element_size()
    return rows * (_rounded(width, ROUND_HEAD) + 1) * FP32_BYTES + shared


aten: Any = torch.ops.aten
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def hidden_bytes(operator: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operator allocates inside itself and frees again; 0 for all that are not known to."""
    if operator is _FLASH_BACKWARD:
        return _flash_backward(*args[:4])
    return 0
