"""Kernels of the formats: functions that pack rows of a matrix, unpack them, and multiply without unpacking.

Codes and statistics are those of bitsandbytes, bit for bit: its functions are called, except on a CPU, where
`pack_4bit` finds the same codes faster. For a weight W of shape `(rows, columns)`:

blocks  W_i = code[index_i] * absmax[i // blocksize]      i: position in the flattened weight
rows    W_ij = index_ij * absmax_i / 127                  index in [-127, 127]
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from qlora_lite.compute.devices import on_cpu
from qlora_lite.compute.lora_linear import FEW_ROWS
from qlora_lite.compute.slicing import row_slices, rows_that_fit
from qlora_lite.patches import patched_compile
from qlora_lite.quantization.int8_matmul import int8_product, suits
from qlora_lite.quantization.layouts import NESTED_BLOCKSIZE, block_count
from qlora_lite.quantization.pack_4bit import pack_4bit

# (first row, rows) of a matrix, in order.
Slices = Iterable[tuple[int, Tensor]]


class DecodeCopy(NamedTuple):
    """4-bit codes `(rows, columns / 2)` in the order of the CPU's kernel, absmax `(blocks of a row, rows)` in bf16."""

    codes: Tensor
    absmax: Tensor


class PackedBuffers(Protocol):
    """What kernels see of a `PackedWeight`; `absmax` is uint8 with double quantization, fp32 otherwise."""

    shape: torch.Size
    format: str
    blocksize: int
    double_quant: bool
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor
    nested_code: Tensor

    @property
    def decode_copy(self) -> DecodeCopy | None:
        """The codes in the order of the CPU kernel for few rows, if the user asked for them."""

    @property
    def bits(self) -> int: ...

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Kernels:
    """What can be done with a packed weight of a format.

    pack: fills the buffers from slices of rows; slices begin at multiples of the layout's `row_step`.
    unpack: (weight, dtype, first, last) -> rows first to last as a new tensor.
    code_values: name of a 4-bit format -> the 16 values that its codes stand for, times the block's absmax.
    select_rows: (weight, numbers `(n,)`) -> those rows, `(n, columns)`, for embeddings.
    integer_product: (weight, x `(n, columns)`) -> x W^T in int8, None where the shapes do not suit it.
    few_rows: (weight, x `(n, columns)`) -> x W^T by a kernel for small n, None where there is none for these.
    """

    pack: Callable[[PackedBuffers, Slices], None]
    unpack: Callable[[PackedBuffers, torch.dtype, int, int], Tensor]
    code_values: Callable[[str], tuple[float, ...]] | None = None
    select_rows: Callable[[PackedBuffers, Tensor], Tensor] | None = None
    integer_product: Callable[[PackedBuffers, Tensor], Tensor | None] | None = None
    few_rows: Callable[[PackedBuffers, Tensor], Tensor | None] | None = None


def import_bitsandbytes(module: str) -> Any:
    """Returns a module of bitsandbytes.

    Suppresses the warning that it logs at import on CPUs without its optional kernels, which are not used here, and
    leaves the import of torch's compiler to the first call of a function that needs it: none does on a CPU.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    disabled, logger.disabled = logger.disabled, True
    try:
        with patched_compile():
            return importlib.import_module(module)
    finally:
        logger.disabled = disabled


bnb = import_bitsandbytes("bitsandbytes.functional")
ops = torch.ops.bitsandbytes

# Values that are packed at once: a multiple of every block size. The fp32 temporaries, a few MiB, stay in the caches.
CHUNK_VALUES = 1 << 18
# int8 codes that are unpacked at once: their fp32 values stay in the caches.
UNPACKED_AT_ONCE = 1 << 19
# torch splits longer sums among its threads, and the result would depend on their number.
SUMMED_AT_ONCE = 1 << 14
INT8_STEP = 1 / 127
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # in the library's names
# The AVX-512 kernel is inexact for blocks of 2048 values and more, and falls back to a compiled kernel. A block of
# 2048 values is therefore passed as two blocks of 1024 with the same absmax.
LARGEST_KERNEL_BLOCK = 1024
# bitsandbytes multiplies at most so many rows by packed codes on every accelerator; with more, it may unpack them.
ACCELERATOR_ROWS = 4
# torch's kernel for int8 codes reads beyond the end of other shapes.
KERNEL_COLUMNS, KERNEL_ROWS = 64, 16
# It ends the process for codes at other addresses.
KERNEL_ALIGNMENT = 16


@functools.cache
def nested_code() -> tuple[float, ...]:
    """Returns the 256 values that the codes of nested statistics stand for."""
    with no_dispatch():  # the table has values under fake tensors too
        return tuple(bnb.create_dynamic_map().tolist())


@functools.cache
def code_values(format: str) -> tuple[float, ...]:
    """Returns the 16 values that the codes of a 4-bit format stand for, times their block's absmax."""
    with no_dispatch():
        return tuple(bnb.get_4bit_type(format, device="cpu").tolist())


@functools.cache
def _found_function(name: str, arguments: str) -> Callable[..., None] | None:
    address = getattr(bnb.lib, name, None)
    if not isinstance(address, ctypes._CFuncPtr):  # type: ignore[attr-defined]
        return None
    kinds = {"p": ctypes.c_void_p, "n": ctypes.c_int64}
    signature = ctypes.CFUNCTYPE(None, *(kinds[kind] for kind in arguments))
    return signature(ctypes.cast(address, ctypes.c_void_p).value or 0)


def library_function(name: str, arguments: str) -> Callable[..., None] | None:
    """Returns a function of bitsandbytes' library for CPUs, None if the library has none or while torch compiles.

    arguments: a letter for each, p for a pointer and n for a number. bitsandbytes' ops take 20 to 30 µs around such a
    function, and make up to six calls of torch.
    """
    return None if torch.compiler.is_compiling() else _found_function(name, arguments)


def _pack_chunk(chunk: Tensor, blocksize: int, format: str) -> tuple[Tensor, Tensor]:
    """Returns bitsandbytes' codes and absmax of a flat chunk; `pack_4bit` finds the same for whole blocks on a CPU."""
    if on_cpu(chunk.device) and chunk.numel() % blocksize == 0 and sys.byteorder == "little":
        return pack_4bit(chunk, blocksize, code_values(format))
    codes, absmax = ops.quantize_4bit(chunk, blocksize, format, torch.uint8)
    return codes, absmax


def _pack_blocks(into: PackedBuffers, slices: Slices) -> None:
    """Fills codes and absmax, `CHUNK_VALUES` values at a time."""
    values = math.prod(into.shape)
    absmax = torch.empty(block_count(values, into.blocksize), dtype=torch.float32, device=into.device)
    for first_row, rows in slices:
        flat, offset = rows.reshape(-1), first_row * into.shape[1]
        for part in row_slices(flat.numel(), CHUNK_VALUES, flat):
            codes, chunk_absmax = _pack_chunk(flat[part], into.blocksize, into.format)
            place = (offset + part.start) * into.bits // 8
            into.packed[place : place + codes.numel()] = codes.view(-1)
            first = (offset + part.start) // into.blocksize
            absmax[first : first + chunk_absmax.numel()] = chunk_absmax
    if not into.double_quant:
        into.absmax.copy_(absmax)
        return
    packed_absmax, nested, mean = nested_statistics(absmax)
    into.absmax.copy_(packed_absmax)
    into.nested_absmax.copy_(nested)
    into.nested_offset.copy_(mean)


def nested_statistics(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packs the fp32 absmax of all blocks of a weight: returns 8-bit codes, their own absmax, and the offset."""
    # The mean that bitsandbytes takes, but independent of the number of threads.
    offset = torch.stack([part.sum() for part in absmax.split(SUMMED_AT_ONCE)]).sum() / absmax.numel()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return codes, state.absmax, offset


def block_absmax(packed: PackedBuffers, first: int, last: int) -> Tensor:
    """Returns the fp32 absmax of blocks first to last."""
    if not packed.double_quant:
        return packed.absmax[first:last]
    if first == 0 and last == packed.absmax.numel():  # no slices: each is an operator, which a rehearsal runs in Python
        return _nested_absmax(packed, packed.absmax, packed.nested_absmax)
    # Statistics are packed in blocks as well, so the slice is taken from the beginning of one.
    skipped = first % NESTED_BLOCKSIZE
    start = first - skipped
    nested = packed.nested_absmax[start // NESTED_BLOCKSIZE : block_count(last, NESTED_BLOCKSIZE)]
    return _nested_absmax(packed, packed.absmax[start:last], nested)[skipped:]


def _nested_absmax(packed: PackedBuffers, codes: Tensor, nested: Tensor) -> Tensor:
    kernel = library_function("cdequantize_blockwise_cpu_fp32", "ppppnn") if on_cpu(codes.device) else None
    if kernel is None or type(codes) is not Tensor:
        found: Tensor = ops.dequantize_blockwise(codes, nested, packed.nested_code, NESTED_BLOCKSIZE, torch.float32)
        return found.add_(packed.nested_offset)
    absmax = torch.empty(codes.shape, dtype=torch.float32)
    tensors = (tensor.data_ptr() for tensor in (packed.nested_code, codes, nested, absmax))
    kernel(*tensors, NESTED_BLOCKSIZE, codes.numel())
    return absmax.add_(packed.nested_offset)


def _unpack_blocks(packed: PackedBuffers, dtype: torch.dtype, first: int, last: int) -> Tensor:
    columns, blocksize = packed.shape[1], packed.blocksize
    values = (last - first) * columns
    start = first * columns
    codes = packed.packed
    if last - first < packed.shape[0]:
        codes = codes[start * packed.bits // 8 : block_count((start + values) * packed.bits, 8)]
    absmax = block_absmax(packed, start // blocksize, block_count(start + values, blocksize))
    if blocksize > LARGEST_KERNEL_BLOCK:
        absmax = absmax.repeat_interleave(blocksize // LARGEST_KERNEL_BLOCK)
        blocksize = LARGEST_KERNEL_BLOCK
    target = dtype if dtype in DTYPE_NAMES else torch.float32
    # The AVX-512 kernel reads the absmax of the wrong block for a row that does not end where a block ends. Codes
    # lie flat, so the kernel is given rows of one block each; or, with a shorter last block, one row of even length.
    rows = (values // blocksize, blocksize) if values % blocksize == 0 else (1, values + values % 2)
    kernel = None
    if rows[1] == blocksize and type(codes) is Tensor and on_cpu(codes.device):
        name = f"cdequantize_blockwise_cpu_{packed.format}_{DTYPE_NAMES[target]}"
        kernel = library_function(name, "pppnnn")
    if kernel is not None:
        out = torch.empty((last - first, columns), dtype=target)
        kernel(codes.data_ptr(), absmax.data_ptr(), out.data_ptr(), blocksize, *rows)
        return out if target == dtype else out.to(dtype)
    flat: Tensor = ops.dequantize_4bit(codes, absmax, blocksize, packed.format, rows, target)
    flat = flat if flat.numel() == values else flat.view(-1)[:values]
    return flat.view(last - first, columns).to(dtype)


def _pack_rows(into: PackedBuffers, slices: Slices) -> None:
    """Fills int8 codes and the absmax of each row; from fp16 values, as bitsandbytes does on every device."""
    count = rows_that_fit(CHUNK_VALUES, into.shape[1])
    for first_row, rows in slices:
        for part in row_slices(rows.shape[0], count, rows):
            codes, absmax, _ = bnb.int8_vectorwise_quant(rows[part].to(torch.float16))
            # A row of zeros has absmax 0 and its codes are 0 / 0.
            codes.masked_fill_((absmax == 0).unsqueeze(1), 0)
            place = slice(first_row + part.start, first_row + part.start + len(codes))
            into.packed[place] = codes
            into.absmax[place] = absmax


def _unpack_rows(packed: PackedBuffers, dtype: torch.dtype, first: int, last: int) -> Tensor:
    values = torch.empty((last - first, packed.shape[1]), dtype=dtype, device=packed.packed.device)
    scale = packed.absmax.unsqueeze(1)
    for part in row_slices(last - first, rows_that_fit(UNPACKED_AT_ONCE, packed.shape[1])):
        rows = slice(first + part.start, first + part.stop)
        # The order of operations of bitsandbytes' int8_vectorwise_dequant, so that the numbers are the same.
        values[part] = (packed.packed[rows] * scale[rows]).mul_(INT8_STEP)
    return values


def _select_rows(packed: PackedBuffers, numbers: Tensor) -> Tensor:
    codes = packed.packed.index_select(0, numbers)
    values: Tensor = ops.int8_vectorwise_dequant(codes, packed.absmax.index_select(0, numbers))
    return values


def _integer_product(packed: PackedBuffers, rows: Tensor) -> Tensor | None:
    return int8_product(rows, packed.packed, packed.absmax) if suits(rows.shape[0], packed.shape) else None


@functools.cache
def _code_table(format: str) -> Tensor:
    with no_dispatch():
        return torch.tensor(code_values(format))


def copy_product(rows: Tensor, copy: DecodeCopy, format: str, blocksize: int) -> Tensor:
    """Returns x W^T for few rows x `(n, columns)` in bf16, from a copy of the codes of W on a CPU."""
    (count, columns), height, absmax = rows.shape, copy.codes.shape[0], copy.absmax.contiguous()
    y: Tensor
    rows = rows if rows.stride(1) == 1 else rows.contiguous()  # op and function read values side by side
    kernel = library_function(f"gemv_4bit_inference_cpu_{format}_bf16", "nnnppppnnn")
    if kernel is not None:
        y = torch.empty((count, height), dtype=torch.bfloat16)
        if type(y) is Tensor:  # a fake tensor has no memory
            tensors = (tensor.data_ptr() for tensor in (rows, copy.codes, absmax, y))
            kernel(count, height, columns, *tensors, blocksize, rows.stride(0), height)
            return y
    y = ops.gemv_4bit(rows, copy.codes, (height, columns), absmax, _code_table(format), blocksize)
    return y


def _few_rows_of_blocks(packed: PackedBuffers, rows: Tensor) -> Tensor | None:
    """On an accelerator the kernel reads the codes as they are; on a CPU it needs the copy, and bf16."""
    copy, on_accelerator = packed.decode_copy, not on_cpu(rows.device)
    if copy is not None and rows.dtype == torch.bfloat16:
        return copy_product(rows, copy, packed.format, packed.blocksize)
    whole_blocks = packed.shape[1] % packed.blocksize == 0
    if on_accelerator and whole_blocks and rows.shape[0] <= ACCELERATOR_ROWS and hasattr(ops, "gemm_4bit"):
        return packed_product(packed, rows)
    return None


def packed_product(packed: PackedBuffers, rows: Tensor) -> Tensor:
    """Returns x W^T by bitsandbytes' op for packed codes, which unpacks the nested statistics itself."""
    absmax, nested = packed.absmax, {}
    if packed.double_quant:
        names = {"absmax_8bit": packed.absmax, "absmax_code": packed.nested_code, "absmax_offset": packed.nested_offset}
        absmax, nested = packed.nested_absmax, names
    codes = packed.packed.view(-1, 1)
    y: Tensor = ops.gemm_4bit(rows, codes, packed.shape, absmax, packed.blocksize, packed.format, **nested)
    return y


def _few_rows_of_rows(packed: PackedBuffers, rows: Tensor) -> Tensor | None:
    """torch's CPU kernel takes int8 codes and bf16 scales. The scale is applied after it, so that it stays in fp32."""
    suitable = packed.shape[1] % KERNEL_COLUMNS == 0 and packed.shape[0] % KERNEL_ROWS == 0
    if not suitable or rows.shape[0] > FEW_ROWS or not on_cpu(rows.device) or rows.dtype != torch.bfloat16:
        return None
    if type(packed.packed) is Tensor and packed.packed.data_ptr() % KERNEL_ALIGNMENT:  # codes in a mapped file
        return None
    ones = rows.new_ones(packed.shape[0])
    y = torch._weight_int8pack_mm(rows.contiguous(), packed.packed, ones)
    return y.mul_(packed.absmax * INT8_STEP)


BLOCK_KERNELS = Kernels(_pack_blocks, _unpack_blocks, code_values=code_values, few_rows=_few_rows_of_blocks)
ROW_KERNELS = Kernels(
    _pack_rows,
    _unpack_rows,
    select_rows=_select_rows,
    integer_product=_integer_product,
    few_rows=_few_rows_of_rows,
)
