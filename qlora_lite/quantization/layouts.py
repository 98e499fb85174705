"""Buffers of a packed weight: the codes, and the statistics that unpacking needs; plain arithmetic, no torch.

A weight of shape `(rows, columns)` has n = rows * columns values. Two layouts are known:

blocks  The flattened weight is cut into ceil(n / blocksize) blocks; each has one statistic, its largest magnitude
        (`absmax`, fp32). Codes lie flat, several in a byte. With double quantization (QLoRA, arXiv:2305.14314,
        section 3) the absmax values lose their mean (`nested_offset`) and are themselves packed to 8 bits, in blocks of
        256 with an fp32 absmax each (`nested_absmax`) and a table of 256 fp32 values (`nested_code`).
rows    Each row has one absmax (fp32). One code takes one byte, so rows can be selected by number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from qlora_lite.errors import ConfigError

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
NESTED_CODE_VALUES = 256
ITEM_BYTES = {"uint8": 1, "int8": 1, "float32": 4}


@dataclass(frozen=True)
class Buffer:
    """Shape and dtype (as torch names it) of one buffer of a packed weight."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Layout(Protocol):
    """Which buffers a packed weight has."""

    @property
    def has_blocks(self) -> bool:
        """Whether statistics belong to blocks of `blocksize` values, and not to rows."""

    def buffers(self, shape: tuple[int, ...], bits: int, blocksize: int, double_quant: bool) -> dict[str, Buffer]:
        """Returns the buffers by name, the codes (`packed`) first."""

    def row_step(self, shape: tuple[int, ...], blocksize: int) -> int:
        """Returns the number of rows at whose multiples a slice of rows may begin."""


def check_blocksize(blocksize: int) -> None:
    """Raises ConfigError unless bitsandbytes has kernels for this block size on every device."""
    if blocksize not in BLOCKSIZES:
        raise ConfigError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}; got {blocksize!r}")


def block_count(values: int, blocksize: int) -> int:
    """Returns the number of blocks that `values` values fill; the last block may be shorter."""
    return -(-values // blocksize)


class BlockLayout:
    """Flat codes, and an absmax for each block of `blocksize` values."""

    has_blocks = True

    def buffers(self, shape: tuple[int, ...], bits: int, blocksize: int, double_quant: bool) -> dict[str, Buffer]:
        values = math.prod(shape)
        blocks = block_count(values, blocksize)
        packed = Buffer((block_count(values * bits, 8),), "uint8")
        if not double_quant:
            return {"packed": packed, "absmax": Buffer((blocks,), "float32")}
        return {
            "packed": packed,
            "absmax": Buffer((blocks,), "uint8"),
            "nested_absmax": Buffer((block_count(blocks, NESTED_BLOCKSIZE),), "float32"),
            "nested_offset": Buffer((), "float32"),
            "nested_code": Buffer((NESTED_CODE_VALUES,), "float32"),
        }

    def row_step(self, shape: tuple[int, ...], blocksize: int) -> int:
        return blocksize // math.gcd(blocksize, shape[1])


class RowLayout:
    """One int8 code per value, and an absmax for each row; `blocksize` and `double_quant` have no meaning."""

    has_blocks = False

    def buffers(self, shape: tuple[int, ...], bits: int, blocksize: int, double_quant: bool) -> dict[str, Buffer]:
        return {"packed": Buffer(shape, "int8"), "absmax": Buffer(shape[:-1], "float32")}

    def row_step(self, shape: tuple[int, ...], blocksize: int) -> int:
        return 1


BLOCKS, ROWS = BlockLayout(), RowLayout()
