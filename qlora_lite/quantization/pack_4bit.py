"""Packs floats to 4 bits on a CPU, many times as fast as bitsandbytes' own search and with its codes, bit for bit.

bitsandbytes divides each block by its largest magnitude and searches the 15 midpoints between neighbouring code
values by bisection for each number. Here [-1, 1] is cut into equal cells, at most one midpoint in each; a cell without
one gives its code at once, and the few numbers in a cell with a midpoint are compared with it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch

CELLS = 8192  # of half the interval; the table of codes stays in the cache nearest to the core
# A number may be computed into the next cell when it lies this near to a border (in cells; fp32 errs by 1e-3).
SAFE_DISTANCE = 0.02
SMALLEST_ABSMAX = 1e-38  # bitsandbytes' own: a block of zeros is divided by it
# Marks the code of a cell with a midpoint, in each of the bytes that are looked at together.
UNDECIDED = 0x80
TOGETHER = 8
ANY_UNDECIDED = -0x7F7F7F7F7F7F7F80  # 0x80 in each byte of an int64


@dataclass(frozen=True)
class CodeTables:
    """What a number in a cell is packed to: `code[cell]`, or, where that has the bit `UNDECIDED`, by a midpoint.

    Numbers above `midpoint[cell]` get `above[cell]`, the others `below[cell]`. undecided: the share of such cells.
    """

    cells: int
    code: Tensor
    midpoint: Tensor
    below: Tensor
    above: Tensor
    undecided: float


@functools.cache
def code_tables(values: tuple[float, ...]) -> CodeTables:
    """Tables for the 16 values of a 4-bit code, which lie in [-1, 1]."""
    with no_dispatch():  # under fake tensors too, the tables have values
        return _code_tables(values)


def _code_tables(values: tuple[float, ...]) -> CodeTables:
    code = torch.tensor(values, dtype=torch.float32)
    order = code.argsort()
    midpoints = (code[order[1:]] + code[order[:-1]]) / 2
    cells = CELLS
    while not _well_inside(midpoints, cells):
        cells += 1
    edges = torch.arange(2 * cells + 1, dtype=torch.float64) / cells - 1
    below = order[torch.bucketize(edges, midpoints.double())].to(torch.uint8)
    inside = ((midpoints.double() + 1) * cells).long()
    decided, above, midpoint = below.clone(), below.clone(), torch.zeros(below.shape)
    decided[inside] |= UNDECIDED
    above[inside] = order[1:].to(torch.uint8)
    midpoint[inside] = midpoints
    return CodeTables(cells, decided, midpoint, below, above, len(midpoints) / len(edges))


def _well_inside(midpoints: Tensor, cells: int) -> bool:
    """Whether each midpoint has a cell of its own and keeps its distance from the cell's borders.

    One at 0 stands on a border and may: 0 is exact, so nothing above it is computed into the cell below.
    """
    place = (midpoints.double() + 1) * cells
    within = place - place.floor()
    safe = (within > SAFE_DISTANCE) & (within < 1 - SAFE_DISTANCE) | (midpoints == 0)
    return bool(safe.all()) and len(place.floor().unique()) == len(midpoints)


def pack_4bit(values: Tensor, blocksize: int, code: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Two codes a byte, the first in the upper half, and the absmax of each block.

    values `(n,)` with n a multiple of blocksize -> uint8 `(n / 2,)`, fp32 `(n / blocksize,)`.
    """
    tables = code_tables(code)
    blocks = values.view(-1, blocksize).float()
    absmax = blocks.abs().amax(1)
    # bitsandbytes cuts the scaled values off at -1 and 1. They are beyond by rounding alone, which changes no code.
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)).view(-1)
    cell = torch.add(torch.tensor(float(tables.cells)), scaled, alpha=tables.cells).to(torch.int32)
    index = tables.code.index_select(0, cell)
    _decide_(index, scaled, cell, tables)
    # Both codes of a byte at once: as a little-endian number, the first one is the lower byte.
    pairs = index.view(torch.int16)
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8), absmax


def _undecided(marks: Tensor, tables: CodeTables) -> Tensor:
    """Places of the groups that have a mark. Fake ones have no values: there, as many as of evenly spread numbers."""
    if not isinstance(marks, FakeTensor):
        return marks.nonzero().view(-1)
    return torch.arange(math.ceil(TOGETHER * tables.undecided * marks.numel()), device=marks.device)


def _decide_(index: Tensor, scaled: Tensor, cell: Tensor, tables: CodeTables) -> None:
    """Compares numbers in cells with a midpoint, and their neighbours: bytes are looked at eight at a time."""
    groups = _undecided(index.view(torch.int64) & ANY_UNDECIDED, tables)
    if not groups.numel():
        return
    numbers, cells = (each.view(-1, TOGETHER).index_select(0, groups) for each in (scaled, cell))
    at = cells.view(-1)
    is_above = numbers.view(-1) > tables.midpoint.index_select(0, at)
    codes = torch.where(is_above, tables.above.index_select(0, at), tables.below.index_select(0, at))
    index.view(-1, TOGETHER).index_copy_(0, groups, codes.view(-1, TOGETHER))
