"""One row for each format that a frozen base weight is stored in; plain arithmetic, no torch.

Other files ask the row of a format, and compare no format with a name of their own. To add a format, add its row to
`FORMATS`; if no kernels of kernels.py pack and unpack it, write these there.

`nf4`, `fp4`  QLoRA (arXiv:2305.14314, section 3): each value of a block becomes the index of the nearest of 16 code
              values after division by the block's absmax; two indices share a byte.
`int8`        LLM.int8() (arXiv:2208.07339, section 2): each value of a row becomes round(127 * value / absmax).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qlora_lite.errors import ConfigError
from qlora_lite.quantization.layouts import BLOCKS, ROWS, Buffer, Layout, check_blocksize

if TYPE_CHECKING:
    from qlora_lite.quantization.kernels import Kernels

DEFAULT_FORMAT = "nf4"
UNPACKED = "none"
FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Format:
    """How one format stores a weight, and what may use it.

    name: as settings, and bitsandbytes' files (`quant_type`), have it.
    help: what it is, in a few words for the command line.
    bits: of one code, 4 or 8. Two codes of 4 bits share a byte.
    layout: which statistics there are, of blocks or of rows.
    kernels: returns the functions that pack and unpack it; called only once there is something to pack, because these
        import torch and bitsandbytes.
    nests: whether the statistics can be packed too (double quantization).
    holds_embeddings: whether an embedding can be stored in it: its kernels select rows by number.
    integer_product: whether its kernels can multiply it by int8 activations (`int8_activations`).
    largest: the largest magnitude that it can hold.
    bitsandbytes: the layout of bitsandbytes' checkpoints that holds it, None if there is none. `4bit` promises codes of
        4 bits in layout `BLOCKS`, the first of two in the upper half of a byte, and kernels with `code_values`, the
        table that the file stores; transformers can load it if bitsandbytes knows the name. `8bit` promises layout
        `ROWS` and values index * absmax / 127. It does not record a name, so one format alone can be read from it.
    """

    name: str
    help: str
    bits: int
    layout: Layout
    kernels: Callable[[], Kernels]
    nests: bool = False
    holds_embeddings: bool = False
    integer_product: bool = False
    largest: float = math.inf
    bitsandbytes: Literal["4bit", "8bit"] | None = None

    def buffers(self, shape: tuple[int, ...], blocksize: int, double_quant: bool) -> dict[str, Buffer]:
        """Returns the buffers of a packed weight of this shape by name."""
        return self.layout.buffers(shape, self.bits, blocksize, double_quant and self.nests)


@functools.cache
def _block_kernels() -> Kernels:
    from qlora_lite.quantization.kernels import BLOCK_KERNELS

    return BLOCK_KERNELS


@functools.cache
def _row_kernels() -> Kernels:
    from qlora_lite.quantization.kernels import ROW_KERNELS

    return ROW_KERNELS


FORMATS = {
    row.name: row
    for row in (
        Format("nf4", "4-bit NormalFloat", 4, BLOCKS, _block_kernels, nests=True, bitsandbytes="4bit"),
        Format("fp4", "4-bit floating point", 4, BLOCKS, _block_kernels, nests=True, bitsandbytes="4bit"),
        Format(
            "int8",
            "8-bit integers, scaled by rows",
            8,
            ROWS,
            _row_kernels,
            holds_embeddings=True,
            integer_product=True,
            largest=FLOAT16_MAX,
            bitsandbytes="8bit",
        ),
    )
}


def format_named(name: str) -> Format:
    """Returns the row of a packed format. Raises ConfigError for an unknown name."""
    if name not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}; got {name!r}")
    return FORMATS[name]


def formats_where(condition: Callable[[Format], bool]) -> list[str]:
    """Returns the names of the formats whose row satisfies a condition."""
    return [name for name, row in FORMATS.items() if condition(row)]


def embedding_formats() -> list[str]:
    """Returns the names of the formats that can store an embedding."""
    return formats_where(lambda row: row.holds_embeddings)


def eight_bit_format() -> Format:
    """Returns the format that bitsandbytes' 8-bit layers and checkpoints hold."""
    return next(row for row in FORMATS.values() if row.bitsandbytes == "8bit")


def either(*names: str) -> str:
    """Returns names as a choice: `a, b or c`."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def row_step(shape: tuple[int, ...], format: str, blocksize: int = 64) -> int:
    """Returns the number of rows that together fill whole blocks.

    A slice of a matrix that is packed by itself begins at a multiple of it.
    """
    return format_named(format).layout.row_step(shape, blocksize)


def packed_bytes(shape: tuple[int, ...], format: str) -> int:
    """Returns the bytes of the codes alone, without statistics."""
    return (math.prod(shape) * format_named(format).bits + 7) // 8


def statistics_bytes(shape: tuple[int, ...], format: str, blocksize: int = 64, double_quant: bool = True) -> int:
    """Returns the bytes of everything that unpacking needs besides the codes."""
    return storage_bytes(shape, format, blocksize, double_quant) - packed_bytes(shape, format)


def storage_bytes(shape: tuple[int, ...], format: str, blocksize: int = 64, double_quant: bool = True) -> int:
    """Returns the bytes that a weight of this shape takes in this format: codes and statistics."""
    row = format_named(format)
    if row.layout.has_blocks:
        check_blocksize(blocksize)
    return sum(buffer.bytes for buffer in row.buffers(shape, blocksize, double_quant).values())
