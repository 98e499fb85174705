"""Packs frozen weights with bitsandbytes' functions and unpacks them again, under modules of our own.

bitsandbytes' modules are not used: on a CPU with AVX512-BF16 the forward pass of its `Linear4bit`, called once
in eval mode, re-packs the weight in place, after which gradients and merges are wrong without a word. Its codes
and statistics are kept: what is packed here unpacks there, bit for bit.

Reading order: how one weight is packed and unpacked in each format -> `PackedWeight` -> the two layers that hold one.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch

from qlora_lite.checks import check_packable
from qlora_lite.compute.devices import on_cpu
from qlora_lite.compute.slicing import row_slices, rows_that_fit
from qlora_lite.quantization import int8_matmul
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import (
    NESTED_BLOCKSIZE,
    block_count,
    format_named,
    packed_bytes,
    row_step,
    storage_bytes,
)
from qlora_lite.quantization.pack_4bit import pack_4bit


def import_bitsandbytes(module: str) -> Any:
    """A module of bitsandbytes, without the warning logged at import on CPUs whose optional kernels we do not use."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    disabled, logger.disabled = logger.disabled, True
    try:
        return importlib.import_module(module)
    finally:
        logger.disabled = disabled


bnb = import_bitsandbytes("bitsandbytes.functional")
ops = torch.ops.bitsandbytes

# A multiple of every block size; the fp32 temporaries of packing are a few times 1 MiB, and stay in the caches.
CHUNK_VALUES = 1 << 18
# So many fp32 values stay in the caches while they are unpacked.
UNPACKED_AT_ONCE = 1 << 19
SUMMED_AT_ONCE = 1 << 14  # torch shares out longer sums among its threads
INT8_STEP = 1 / 127
# The AVX-512 kernel is inexact from 2048 on and falls back to a compiled one; a block of 2048 with one absmax is
# two blocks of 1024 with that absmax.
LARGEST_KERNEL_BLOCK = 1024
Slices = Iterable[tuple[int, Tensor]]


@functools.cache
def _nested_code() -> tuple[float, ...]:
    with no_dispatch():  # under fake tensors too, the table has values
        return tuple(bnb.create_dynamic_map().tolist())


@functools.cache
def code_values(format: str) -> tuple[float, ...]:
    """The 16 values that a 4-bit format's codes stand for, times their block's absmax."""
    with no_dispatch():
        return tuple(bnb.get_4bit_type(format, device="cpu").tolist())


def _pack_chunk(chunk: Tensor, blocksize: int, format: str) -> tuple[Tensor, Tensor]:
    """bitsandbytes' codes and absmax of a flat chunk; whole blocks on a CPU by the faster search, to the same codes."""
    if on_cpu(chunk.device) and chunk.numel() % blocksize == 0 and sys.byteorder == "little":
        return pack_4bit(chunk, blocksize, code_values(format))
    codes, absmax = ops.quantize_4bit(chunk, blocksize, format, torch.uint8)
    return codes, absmax


def _pack_blocks(into: PackedWeight, slices: Slices) -> None:
    """Fills packed codes and absmax, `CHUNK_VALUES` values at a time; slices begin where blocks do."""
    values = math.prod(into.shape)
    absmax = torch.empty(block_count(values, into.blocksize), dtype=torch.float32, device=into.device)
    for first_row, rows in slices:
        flat, offset = rows.reshape(-1), first_row * into.shape[1]
        for part in row_slices(flat.numel(), CHUNK_VALUES, flat):
            codes, chunk_absmax = _pack_chunk(flat[part], into.blocksize, into.format)
            place = (offset + part.start) // 2
            into.packed[place : place + codes.numel()] = codes.view(-1)
            first = (offset + part.start) // into.blocksize
            absmax[first : first + chunk_absmax.numel()] = chunk_absmax
    if not into.double_quant:
        into.absmax.copy_(absmax)
        return
    # bitsandbytes' mean, but the same however many threads torch has.
    offset_of_all = torch.stack([part.sum() for part in absmax.split(SUMMED_AT_ONCE)]).sum() / absmax.numel()
    codes, state = bnb.quantize_blockwise(absmax - offset_of_all, blocksize=NESTED_BLOCKSIZE)
    into.absmax.copy_(codes)
    into.nested_absmax.copy_(state.absmax)
    into.nested_offset.copy_(offset_of_all)


def _block_absmax(packed: PackedWeight, first: int, last: int) -> Tensor:
    """The fp32 statistics of blocks first to last."""
    if not packed.double_quant:
        return packed.absmax[first:last]
    # Statistics are packed in blocks too, so the slice is taken from the first whole one on.
    skipped = first % NESTED_BLOCKSIZE
    start = first - skipped
    nested = packed.nested_absmax[start // NESTED_BLOCKSIZE : block_count(last, NESTED_BLOCKSIZE)]
    absmax: Tensor = ops.dequantize_blockwise(
        packed.absmax[start:last], nested, packed.nested_code, NESTED_BLOCKSIZE, torch.float32
    )
    return absmax.add_(packed.nested_offset)[skipped:]


def _unpack_blocks(packed: PackedWeight, dtype: torch.dtype, first: int, last: int) -> Tensor:
    columns, blocksize = packed.shape[1], packed.blocksize
    values = (last - first) * columns
    start = first * columns
    codes = packed.packed[start // 2 : block_count(start + values, 2)]
    absmax = _block_absmax(packed, start // blocksize, block_count(start + values, blocksize))
    if blocksize > LARGEST_KERNEL_BLOCK:
        absmax = absmax.repeat_interleave(blocksize // LARGEST_KERNEL_BLOCK)
        blocksize = LARGEST_KERNEL_BLOCK
    target = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    # The AVX-512 kernel takes the statistics of wrong blocks for a row that does not end where a block ends. Codes
    # are laid out flat, so the kernel is told of rows of one block; or, with a shorter last block, of one even row.
    rows = (values // blocksize, blocksize) if values % blocksize == 0 else (1, values + values % 2)
    flat: Tensor = ops.dequantize_4bit(codes, absmax, blocksize, packed.format, rows, target)
    return flat.view(-1)[:values].view(last - first, columns).to(dtype)


def _pack_rows(into: PackedWeight, slices: Slices) -> None:
    """Fills int8 codes and the absmax of each row; from fp16, as bitsandbytes does it on every device."""
    count = rows_that_fit(CHUNK_VALUES, into.shape[1])
    for first_row, rows in slices:
        for part in row_slices(rows.shape[0], count, rows):
            codes, absmax, _ = bnb.int8_vectorwise_quant(rows[part].to(torch.float16))
            # A row of zeros has absmax 0 and its codes are 0 / 0.
            codes.masked_fill_((absmax == 0).unsqueeze(1), 0)
            place = slice(first_row + part.start, first_row + part.start + len(codes))
            into.packed[place] = codes
            into.absmax[place] = absmax


def _unpack_rows(packed: PackedWeight, dtype: torch.dtype, first: int, last: int) -> Tensor:
    values = torch.empty((last - first, packed.shape[1]), dtype=dtype, device=packed.packed.device)
    scale = packed.absmax.unsqueeze(1)
    for part in row_slices(last - first, rows_that_fit(UNPACKED_AT_ONCE, packed.shape[1])):
        rows = slice(first + part.start, first + part.stop)
        # In the order of bitsandbytes' int8_vectorwise_dequant, which gives these very numbers.
        values[part] = (packed.packed[rows] * scale[rows]).mul_(INT8_STEP)
    return values


def _multiply_int8(packed: PackedWeight, rows: Tensor) -> Tensor | None:
    if not (packed.int8_activations and int8_matmul.suits(rows.shape[0], packed.shape)):
        return None
    return int8_matmul.int8_product(rows, packed.packed, packed.absmax)


@dataclass(frozen=True)
class Actions:
    """One row of actions: fill a `PackedWeight` from rows, make a tensor from it, multiply without making one."""

    pack: Callable[[PackedWeight, Slices], None]
    unpack: Callable[[PackedWeight, torch.dtype, int, int], Tensor]
    multiply: Callable[[PackedWeight, Tensor], Tensor | None] = lambda packed, rows: None


ACTIONS = {
    "nf4": Actions(_pack_blocks, _unpack_blocks),
    "fp4": Actions(_pack_blocks, _unpack_blocks),
    "int8": Actions(_pack_rows, _unpack_rows, _multiply_int8),
}


class PackedWeight(nn.Module):
    """A frozen matrix of shape `(rows, columns)` in one of the packed formats (equations in formats.py).

    Its buffers are exactly `storage_bytes()` bytes. They move between devices with the model, and nothing casts
    them: `.half()` or `.to(dtype)` on a model leaves every bit in place. A new one holds zeros.
    """

    of_checkpoint = True  # whether it holds what the checkpoint does, and not what LoftQ made of it (base_identity.py)
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor
    nested_code: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        format: str,
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        facts = format_named(format)
        self.shape, self.format, self.blocksize = torch.Size(shape), format, blocksize
        self.double_quant = double_quant and facts.blockwise
        self.int8_activations = False

        def buffer(name: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.zeros(size, dtype=dtype, device=device))

        if not facts.blockwise:
            buffer("packed", shape, torch.int8)
            buffer("absmax", (shape[0],), torch.float32)
            return
        blocks = block_count(math.prod(shape), blocksize)
        buffer("packed", (packed_bytes(shape, format),), torch.uint8)
        buffer("absmax", (blocks,), torch.uint8 if self.double_quant else torch.float32)
        if self.double_quant:
            buffer("nested_absmax", (block_count(blocks, NESTED_BLOCKSIZE),), torch.float32)
            buffer("nested_offset", (), torch.float32)
            code = torch.tensor(_nested_code(), dtype=torch.float32).to(device or "cpu")
            self.register_buffer("nested_code", code, persistent=False)

    @classmethod
    def of(cls, weight: Tensor, config: QuantConfig, format: str | None = None, name: str = "weight") -> PackedWeight:
        """Packs a matrix. Raises QuantizationError, naming it, for NaN, infinity, or a wrong dtype or shape."""
        check_packable(weight, name, format or config.format)
        return cls.from_slices(weight.shape, weight.device, [(0, weight.detach())], config, format)

    @classmethod
    def from_slices(
        cls, shape: tuple[int, ...], device: torch.device, slices: Slices, config: QuantConfig, format: str | None
    ) -> PackedWeight:
        """Packs (first row, finite rows) of a matrix, slices at multiples of `row_step`, to the codes of the whole."""
        new = cls((shape[0], shape[1]), format or config.format, config.blocksize, config.double_quant, device)
        new.int8_activations = config.int8_activations and new.format == config.format
        narrow = ((first, rows.float() if rows.dtype == torch.float64 else rows) for first, rows in slices)
        ACTIONS[new.format].pack(new, narrow)
        return new

    @property
    def dtype(self) -> torch.dtype:
        """What the values are stored as: uint8 or int8."""
        return self.packed.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def storage_bytes(self) -> int:
        """Bytes of values and statistics, from the formula; equal to what the buffers hold."""
        return storage_bytes(tuple(self.shape), self.format, self.blocksize, self.double_quant)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix in this dtype, as a new tensor."""
        return ACTIONS[self.format].unpack(self, dtype, 0, self.shape[0])

    @property
    def row_step(self) -> int:
        """Rows that together fill whole blocks; a slice of rows must begin at a multiple of them."""
        return row_step(self.shape, self.format, self.blocksize)

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start to stop of the matrix; start, and stop unless it is the end, are multiples of `row_step`."""
        return ACTIONS[self.format].unpack(self, dtype, start, stop)

    def own_product(self, rows: Tensor) -> Tensor | None:
        """rows W^T without unpacking, where the format has a way and `int8_activations` asks for it; else None."""
        return ACTIONS[self.format].multiply(self, rows)

    def rows(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of an int8 matrix by number: tokens of any shape -> `(*tokens.shape, columns)`."""
        flat = tokens.reshape(-1)
        codes = self.packed.index_select(0, flat)
        values: Tensor = ops.int8_vectorwise_dequant(codes, self.absmax.index_select(0, flat))
        return values.to(dtype).view(*tokens.shape, self.shape[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        blocks = f", blocksize={self.blocksize}, double_quant={self.double_quant}" if self.format != "int8" else ""
        return f"{tuple(self.shape)}, format={self.format}{blocks}"
