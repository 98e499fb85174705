"""Packs floats to 4 bits on a CPU, many times as fast as bitsandbytes' own search and to the same codes, bit for bit.

    index_i = argmin_j |x_i / absmax - code_j|        absmax: largest magnitude of the block of x_i

bitsandbytes searches the 15 midpoints between neighbouring code values by bisection, for each value. Here [-1, 1] is
cut into equal cells with at most one midpoint in each. A cell without a midpoint gives the code at once; the few
values in a cell with a midpoint are compared with it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch

CELLS = 8192  # of half the interval; the table of codes stays in the L1 cache
# Distance from a cell's border, in cells, within which rounding may compute the next cell (fp32 errs by 1e-3).
SAFE_DISTANCE = 0.02
SMALLEST_ABSMAX = 1e-38  # as in bitsandbytes: the divisor of a block of zeros
# The bit that marks the code of a cell with a midpoint; TOGETHER codes are tested at once.
UNDECIDED = 0x80
TOGETHER = 8
ANY_UNDECIDED = -0x7F7F7F7F7F7F7F80  # 0x80 in each byte of an int64


@dataclass(frozen=True)
class CodeTables:
    """The code of a value by its cell: `code[cell]`, unless that has the bit `UNDECIDED`.

    In an undecided cell, values above `midpoint[cell]` get `above[cell]`, the others `below[cell]`.
    undecided: the share of undecided cells.
    """

    cells: int
    code: Tensor
    midpoint: Tensor
    below: Tensor
    above: Tensor
    undecided: float


@functools.cache
def code_tables(values: tuple[float, ...]) -> CodeTables:
    """Returns the tables for the 16 values of a 4-bit code, which lie in [-1, 1]."""
    with no_dispatch():  # the tables have values under fake tensors too
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
    """Whether each midpoint has a cell of its own and is not too near to the borders of the cell.

    A midpoint at 0 may lie on a border: 0 is exact, so no value above it is computed into the cell below.
    """
    place = (midpoints.double() + 1) * cells
    within = place - place.floor()
    safe = (within > SAFE_DISTANCE) & (within < 1 - SAFE_DISTANCE) | (midpoints == 0)
    return bool(safe.all()) and len(place.floor().unique()) == len(midpoints)


def pack_4bit(values: Tensor, blocksize: int, code: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Returns the codes, two in a byte with the first in the upper half, and the absmax of each block.

    values `(n,)` with n a multiple of blocksize -> uint8 `(n / 2,)`, fp32 `(n / blocksize,)`.
    """
    tables = code_tables(code)
    blocks = values.view(-1, blocksize).float()
    absmax = blocks.abs().amax(1)
    # bitsandbytes clamps the scaled values to [-1, 1]. They exceed it by rounding only, which changes no code.
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)).view(-1)
    cell = torch.add(torch.tensor(float(tables.cells)), scaled, alpha=tables.cells).to(torch.int32)
    index = tables.code.index_select(0, cell)
    _decide_(index, scaled, cell, tables)
    # Both codes of a byte at once: in a little-endian number, the first one is the lower byte.
    pairs = index.view(torch.int16)
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8), absmax


def _undecided(marks: Tensor, tables: CodeTables) -> Tensor:
    """Returns the positions of groups with a mark; for fake tensors, as many as evenly spread values would give."""
    if not isinstance(marks, FakeTensor):
        return marks.nonzero().view(-1)
    return torch.arange(math.ceil(TOGETHER * tables.undecided * marks.numel()), device=marks.device)


def _decide_(index: Tensor, scaled: Tensor, cell: Tensor, tables: CodeTables) -> None:
    """Sets the codes of values in undecided cells, and of the others in their groups of eight."""
    groups = _undecided(index.view(torch.int64) & ANY_UNDECIDED, tables)
    if not groups.numel():
        return
    numbers, cells = (each.view(-1, TOGETHER).index_select(0, groups) for each in (scaled, cell))
    at = cells.view(-1)
    is_above = numbers.view(-1) > tables.midpoint.index_select(0, at)
    codes = torch.where(is_above, tables.above.index_select(0, at), tables.below.index_select(0, at))
    index.view(-1, TOGETHER).index_copy_(0, groups, codes.view(-1, TOGETHER))
