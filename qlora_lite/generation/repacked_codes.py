"""Copies of 4-bit codes in the order that bitsandbytes' CPU kernel for few rows reads them in.

The kernel (`gemv_4bit` on a CPU with AVX512-BF16) multiplies without unpacking, but wants the codes of 32 rows side by
side, and absmax in bf16. bitsandbytes re-packs the weight itself, after which it cannot be trained. A copy leaves the
weight alone and costs 0.53 bytes a value, about as much as the weight, so it is made only where it was asked for.

The copy has 32 bytes for each pair of columns in each group of 32 rows. Byte j holds the code of row j // 2 in its
lower half and that of row 16 + j // 2 in its upper half, both of column j % 2 of the pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qlora_lite.compute.devices import on_cpu
from qlora_lite.generation.decode_step import short_steps
from qlora_lite.generation.joined_products import joined_products
from qlora_lite.offload.mapped_file import is_mapped
from qlora_lite.quantization.formats import format_named
from qlora_lite.quantization.kernels import DecodeCopy, block_absmax, bnb
from qlora_lite.quantization.packed_weight import PackedWeight

GROUP_ROWS = 32
ABSMAX_BYTES = 2


def decode_copy_bytes(weight: PackedWeight) -> int:
    """Returns the bytes that a copy of this weight takes; 0 if the kernel cannot use one."""
    if not _suits(weight):
        return 0
    values = weight.shape.numel()
    return values // 2 + values // weight.blocksize * ABSMAX_BYTES


def _suits(weight: PackedWeight) -> bool:
    rows, columns = weight.shape
    return (
        format_named(weight.format).layout.has_blocks
        and weight.bits == 4
        and rows % GROUP_ROWS == 0
        and columns % weight.blocksize == 0
        and type(weight.packed) is Tensor
        and on_cpu(weight.device)
        and not is_mapped(weight.packed)  # a copy would hold in memory what was to stay on disk
        and not weight.packed.is_inference()  # without a version, a change of the codes would go unnoticed
        and bool(bnb.has_avx512bf16())
    )


def repacked(weight: PackedWeight) -> DecodeCopy:
    """Returns codes and absmax of a 4-bit weight in the order of the kernel."""
    rows, columns = weight.shape
    groups = weight.packed.view(rows // GROUP_ROWS, 2, GROUP_ROWS // 2, columns // 2).transpose(-1, -2)
    low, high = groups[:, 0], groups[:, 1]
    codes = torch.empty((*low.shape, 2), dtype=torch.uint8)
    codes[..., 0] = (high & 0xF0) | (low >> 4)
    codes[..., 1] = (high << 4) | (low & 0x0F)
    absmax = block_absmax(weight, 0, weight.shape.numel() // weight.blocksize)
    by_columns = absmax.view(rows, columns // weight.blocksize).T.to(torch.bfloat16).contiguous()
    return DecodeCopy(codes.view(rows, columns // 2), by_columns)


@contextmanager
def decode_copies(model: nn.Module) -> Iterator[int]:
    """Makes steps of few rows, as in `generate`, fast on a CPU within the block. Yields the bytes that this takes.

    Each 4-bit weight gets a copy of its codes in the order of a CPU kernel: `decode_copy_bytes`, 0.53 bytes a value.
    The copies are dropped at the end. Weights that the kernel does not take, on another device, on a CPU without
    AVX512-BF16, or of int8, get none, and compute as without this. Layers with the same input are multiplied at once
    (joined_products.py), and norms and attention are shorter (decode_step.py). Batches of prompts with more than 128
    tokens together, training and merging use the weights themselves, within the block too. Products differ from those
    of the unpacked weights as bf16 does from itself: absmax is rounded to bf16.
    """
    weights = [module for module in model.modules() if isinstance(module, PackedWeight) and module.decode_copy is None]
    chosen = [weight for weight in weights if decode_copy_bytes(weight)]
    try:
        for weight in chosen:
            weight.set_decode_copy(repacked(weight))
        with short_steps(model), joined_products(model):
            yield sum(map(decode_copy_bytes, chosen))
    finally:
        for weight in chosen:
            weight.set_decode_copy(None)
