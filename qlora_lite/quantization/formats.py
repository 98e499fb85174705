"""Facts of the formats that a frozen base weight is stored in; plain arithmetic, no torch.

A weight of shape `(rows, columns)` has n = rows * columns values.

4-bit formats (`nf4`, `fp4`: QLoRA, arXiv:2305.14314, section 3) cut the flattened weight into
ceil(n / blocksize) blocks. A block keeps its largest magnitude (`absmax`, fp32); each value
becomes the index of the nearest of 16 code values after division by it; two indices share a
byte. With double quantization the absmax values lose their mean (`nested_offset`), and are
themselves packed to 8 bits in blocks of 256 with a fp32 absmax each and a table of 256 fp32 values.

`int8` keeps one byte per value and one fp32 absmax per row (LLM.int8(), arXiv:2208.07339, section 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora_lite.errors import ConfigError

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
NESTED_CODE_VALUES = 256
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Format:
    """One row of facts: how many bits a value takes, and whether statistics belong to blocks or rows."""

    name: str
    bits: int
    blockwise: bool


FORMATS = {
    "nf4": Format("nf4", bits=4, blockwise=True),
    "fp4": Format("fp4", bits=4, blockwise=True),
    "int8": Format("int8", bits=8, blockwise=False),
}
UNPACKED = "none"


def format_named(name: str) -> Format:
    """The facts of a packed format. Raises ConfigError for a name that is none."""
    if name not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}; got {name!r}")
    return FORMATS[name]


def check_blocksize(blocksize: int) -> None:
    """Raises ConfigError unless bitsandbytes has kernels for this block size on every device."""
    if blocksize not in BLOCKSIZES:
        raise ConfigError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}; got {blocksize!r}")


def block_count(values: int, blocksize: int) -> int:
    """How many blocks hold `values` values; the last one may be shorter."""
    return -(-values // blocksize)


def row_step(shape: tuple[int, ...], format: str, blocksize: int = 64) -> int:
    """Rows that together fill whole blocks: a slice of a matrix that is packed by itself begins at a multiple."""
    return blocksize // math.gcd(blocksize, shape[1]) if format_named(format).blockwise else 1


def packed_bytes(shape: tuple[int, ...], format: str) -> int:
    """Bytes of the packed values alone, without statistics."""
    return (math.prod(shape) * format_named(format).bits + 7) // 8


def statistics_bytes(shape: tuple[int, ...], format: str, blocksize: int = 64, double_quant: bool = True) -> int:
    """Bytes of everything that unpacking needs besides the packed values."""
    facts = format_named(format)
    if not facts.blockwise:
        return math.prod(shape[:-1]) * FLOAT32_BYTES
    check_blocksize(blocksize)
    blocks = block_count(math.prod(shape), blocksize)
    if not double_quant:
        return blocks * FLOAT32_BYTES
    nested_absmax = block_count(blocks, NESTED_BLOCKSIZE) * FLOAT32_BYTES
    return blocks + nested_absmax + NESTED_CODE_VALUES * FLOAT32_BYTES + FLOAT32_BYTES


def storage_bytes(shape: tuple[int, ...], format: str, blocksize: int = 64, double_quant: bool = True) -> int:
    """Bytes that a weight of this shape occupies when it is stored in this format: values and statistics."""
    return packed_bytes(shape, format) + statistics_bytes(shape, format, blocksize, double_quant)
