"""What libraries of a CUDA device allocate besides the tensors of a step, which no trace of tensors sees, with sources.

Rehearsals for such a device run on fake CPU tensors (devices.py), so the operators named here are the CPU's; each
stands for the one that a CUDA device would run in its place.

Freed when the operator ends (`hidden_bytes`):
- the backward pass of fused attention, FlashAttention-2's. torch: aten/src/ATen/native/transformers/cuda/
  attention_backward.cu and flash_attn/flash_api.cpp, `mha_bwd`: `softmax_d`, `dq_accum`, `dk_expanded`, `dv_expanded`.
- bitsandbytes' product with a 4-bit weight, `gemm_4bit` of bitsandbytes/backends/cuda/ops.py: the weight unpacked, and
  its statistics, if they are packed too. Up to 1536 rows some cards have a kernel that unpacks nothing; counted all the
  same.
Kept (`kept_bytes`):
- cuBLAS's workspace, from the caching allocator, at the first product of each thread: backward has its own. torch:
  aten/src/ATen/cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize`: `:4096:2:16:8` KiB unless
  CUBLAS_WORKSPACE_CONFIG says otherwise. (On Hopper and Blackwell 32 MiB: twice 23.9 MiB more than counted here.)

Not counted: attention's forward pass when few heads and rows make it split the keys, and what cuDNN, cuBLASLt and
matrix products take inside of these workspaces.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor

FP32_BYTES = 4
# mha_bwd rounds rows of queries to 128; widths of heads to 32, and to 256 above 192.
ROUND_ROWS = 128
ROUND_HEAD = 32
WIDE_HEAD = 192
WIDEST_HEAD = 256
# 2 buffers of 4096 KiB and 8 of 16 KiB.
CUBLAS_WORKSPACE = (2 * 4096 + 8 * 16) << 10


def _rounded(value: int, to: int) -> int:
    return -(-value // to) * to


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Sums of dq and of softmax rows in fp32; dk and dv of each query head, if heads share keys."""
    batch, heads, tokens, width = query.shape
    rows = batch * heads * _rounded(tokens, ROUND_ROWS)
    width_rounded = _rounded(width, ROUND_HEAD) if width <= WIDE_HEAD else WIDEST_HEAD
    shared = 0
    if key.shape[1] != heads:
        shared = batch * heads * key.shape[2] * (width + value.shape[-1]) * key.element_size()
    return rows * (width_rounded + 1) * FP32_BYTES + shared


def _gemm_4bit(rows: Tensor, packed: Tensor, shape: list[int], absmax: Tensor, blocksize: int, *_: Any) -> int:
    """The weight in the dtype of the rows; the fp32 statistics of each block, where they are packed to one byte."""
    blocks = -(-prod(shape) // blocksize)
    # Statistics that are packed come with the few of their own in the place of absmax.
    statistics = blocks * FP32_BYTES if absmax.numel() < blocks else 0
    return prod(shape) * rows.element_size() + statistics


_INSIDE: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
    "bitsandbytes::gemm_4bit": _gemm_4bit,
}
_PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm")} | {"bitsandbytes::gemm_4bit"}


def hidden_bytes(operator: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operator allocates inside itself and frees again; 0 for all that are not known to."""
    inside = _INSIDE.get(operator.name().partition(".")[0])
    return 0 if inside is None else inside(*args)


def kept_bytes(operator: Any) -> int:
    """Bytes that the first such operator of a thread allocates and keeps for those that follow."""
    return CUBLAS_WORKSPACE if operator.name().partition(".")[0] in _PRODUCTS else 0
