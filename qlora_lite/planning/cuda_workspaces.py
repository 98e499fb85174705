"""Memory that libraries allocate on a CUDA device without a tensor, so that no trace of tensors sees it; with sources.

A rehearsal for a CUDA device runs on fake CPU tensors (rehearsal.py). The operators named here are therefore the CPU's,
and each stands for the operator that a CUDA device would run instead.

Transient, freed when the operator ends:
- The backward pass of FlashAttention-2. torch: aten/src/ATen/native/transformers/cuda/attention_backward.cu and
  flash_attn/flash_api.cpp, `mha_bwd`: `softmax_d`, `dq_accum`, `dk_expanded`, `dv_expanded`.
- The product with a 4-bit weight in bitsandbytes, `gemm_4bit` of bitsandbytes/backends/cuda/ops.py: the unpacked weight
  and, with double quantization, the unpacked statistics. Some cards have a kernel that unpacks nothing for up to 1536
  rows; it is not considered, so the prediction is too high there.
Persistent, kept after the operator:
- The workspace of cuBLAS, allocated through the caching allocator at the first product of each thread (backward has its
  own thread). torch: aten/src/ATen/cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize`: `:4096:2:16:8` KiB unless
  CUBLAS_WORKSPACE_CONFIG is set. On Hopper and Blackwell it is 32 MiB, which is 23.9 MiB per thread more than counted.

Not counted: the forward pass of attention where few heads and rows make it split the keys; cuDNN; cuBLASLt.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torch import Tensor
from torch._ops import OpOverload

FP32_BYTES = 4
# mha_bwd rounds the number of query rows up to 128, and head widths up to 32, or to 256 above 192.
ROUND_ROWS = 128
ROUND_HEAD = 32
WIDE_HEAD = 192
WIDEST_HEAD = 256
# 2 buffers of 4096 KiB and 8 of 16 KiB.
CUBLAS_WORKSPACE = (2 * 4096 + 8 * 16) << 10


def _rounded(value: int, to: int) -> int:
    return -(-value // to) * to


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> int:
    """Returns the bytes of dq and softmax sums in fp32 and, if heads share keys, of dk and dv for each query head.

    query: (batch, heads, tokens, width); key, value: (batch, key heads, key tokens, width).
    """
    batch, heads, tokens, width = query.shape
    rows = batch * heads * _rounded(tokens, ROUND_ROWS)
    width_rounded = _rounded(width, ROUND_HEAD) if width <= WIDE_HEAD else WIDEST_HEAD
    shared = 0
    if key.shape[1] != heads:
        shared = batch * heads * key.shape[2] * (width + value.shape[-1]) * key.element_size()
    return rows * (width_rounded + 1) * FP32_BYTES + shared


def _gemm_4bit(rows: Tensor, packed: Tensor, shape: list[int], absmax: Tensor, blocksize: int, *_: object) -> int:
    """Returns the bytes of the weight in the dtype of `rows` and, if they are packed too, of its fp32 statistics."""
    blocks = -(-prod(shape) // blocksize)
    # With double quantization, absmax holds the statistics of the statistics, which are fewer than the blocks.
    statistics = blocks * FP32_BYTES if absmax.numel() < blocks else 0
    return prod(shape) * rows.element_size() + statistics


_TRANSIENT: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
    "bitsandbytes::gemm_4bit": _gemm_4bit,
}
_PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm")} | {"bitsandbytes::gemm_4bit"}


def transient_workspace_bytes(operator: OpOverload, args: tuple[object, ...]) -> int:
    """Returns the bytes that an operator allocates inside itself and frees again; 0 for operators not listed here."""
    size = _TRANSIENT.get(operator.name().partition(".")[0])
    return 0 if size is None else size(*args)


def persistent_workspace_bytes(operator: OpOverload) -> int:
    """Returns the bytes that an operator allocates and keeps if it is the first such operator of its thread."""
    return CUBLAS_WORKSPACE if operator.name().partition(".")[0] in _PRODUCTS else 0
