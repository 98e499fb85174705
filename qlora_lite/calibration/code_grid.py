"""What a block of a 4-bit format can hold: the 16 code values, and the absmax that its statistics can store.

    W_i = code[index_i] * absmax        absmax may be negative: it mirrors the code

bitsandbytes' kernels multiply by the absmax as it is, so its sign is free. Code values of NF4 are not symmetric: 7 are
below zero and 8 above, so a mirrored block is another set of values. With double quantization an absmax is one of 256
values times the largest of its group. That largest is settled before the codes are chosen, so that every absmax that is
tried is one that the file can hold, and nothing is rounded afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_lite.quantization.formats import format_named
from qlora_lite.quantization.kernels import nested_code
from qlora_lite.quantization.layouts import NESTED_BLOCKSIZE, block_count
from qlora_lite.quantization.packed_weight import PackedWeight

# How much larger an absmax can become than the largest of its group was before any error was passed on.
HEADROOM = 1.25
# Of half of [-1, 1].
CELLS = 512


def _nearest(values: Tensor, sorted_values: Tensor) -> Tensor:
    """Returns the place of the nearest of some sorted values, int32, in the shape of `values`."""
    midpoints = (sorted_values[1:] + sorted_values[:-1]) / 2
    return torch.bucketize(values, midpoints, out_int32=True)


@dataclass(frozen=True)
class CodeGrid:
    """The code values of a format in rising order, `(16,)`, and the index that each has in the format.

    [-1, 1] is cut into cells with at most one midpoint between neighbouring values each: in a cell, the nearest value
    has the place `below`, or the next one for numbers above `midpoint` (infinite in a cell without one). A search for
    each number would take five times as long.
    is_symmetric: whether mirroring changes nothing, as for FP4.
    """

    values: Tensor
    indices: Tensor
    below: Tensor
    midpoint: Tensor
    is_symmetric: bool

    @classmethod
    def of(cls, format: str, like: Tensor) -> CodeGrid:
        """Returns the grid of a 4-bit format on the device and in the dtype of a tensor."""
        table = format_named(format).kernels().code_values
        assert table is not None  # every format of blocks has one
        values, indices = torch.tensor(table(format)).to(like).sort()
        midpoints = (values[1:] + values[:-1]) / 2
        cells = ((midpoints + 1) * CELLS).long()
        assert len(cells.unique()) == len(midpoints)
        edges = torch.arange(2 * CELLS + 1).to(like) / CELLS - 1
        midpoint = torch.full_like(edges, torch.inf).index_copy_(0, cells, midpoints)
        is_symmetric = bool(torch.equal(values, -values.flip(0)))
        return cls(values, indices.to(torch.uint8), _nearest(edges, values), midpoint, is_symmetric)

    def places(self, scaled: Tensor) -> Tensor:
        """Returns the place in `values` of the nearest value to each scaled one (int32)."""
        inside = scaled.clamp(-1, 1).view(-1)
        cells = torch.add(inside.new_tensor(float(CELLS)), inside, alpha=CELLS).to(torch.int32)
        above = inside > self.midpoint.index_select(0, cells)
        return self.below.index_select(0, cells).add_(above).view(scaled.shape)

    def at(self, places: Tensor) -> Tensor:
        """Returns the values at some places, in their shape."""
        return self.values.index_select(0, places.reshape(-1)).view(places.shape)


@dataclass(frozen=True)
class AbsmaxGrid:
    """The absmax that each block of a matrix can have, blocks in the shape `(rows, blocks of a row)`.

    largest: of the group of each block, in that shape; None without double quantization, where any fp32 will do.
    code: the 256 values of the nested statistics in rising order, times `largest`. indices: their numbers in the file.
    """

    largest: Tensor | None
    code: Tensor
    indices: Tensor

    @classmethod
    def of(cls, absmax: Tensor, double_quant: bool) -> AbsmaxGrid:
        """Returns the grid for blocks whose absmax, before any error is passed on, are `absmax` `(rows, blocks)`."""
        code, indices = torch.tensor(nested_code()).to(absmax).sort()
        if not double_quant:
            return cls(None, code, indices)
        groups = block_count(absmax.numel(), NESTED_BLOCKSIZE)
        flat = absmax.new_zeros(groups * NESTED_BLOCKSIZE)
        flat[: absmax.numel()] = absmax.reshape(-1)
        # fp32, since the file holds fp32: the values that are tried are then exactly those that are unpacked.
        largest = (flat.view(groups, NESTED_BLOCKSIZE).amax(1) * HEADROOM).float().to(absmax)
        each = largest.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()].view_as(absmax)
        return cls(each, code, indices)

    def of_rows(self, rows: slice) -> AbsmaxGrid:
        """Returns the grid of some rows of the matrix."""
        return replace(self, largest=None if self.largest is None else self.largest[rows])

    def rounded(self, wanted: Tensor, block: int) -> Tensor:
        """Returns the nearest absmax that block number `block` of each row can have: `(..., rows)`."""
        if self.largest is None:
            return wanted.float().to(wanted)
        largest = self.largest[:, block]
        places = _nearest(wanted / largest.clamp(min=torch.finfo(torch.float32).tiny), self.code)
        return self.code.index_select(0, places.reshape(-1)).view(places.shape) * largest

    def store_(self, absmax: Tensor, packed: PackedWeight) -> None:
        """Writes the chosen absmax `(rows, blocks)`, each of which came from `rounded`, to a packed weight."""
        if self.largest is None:
            packed.absmax.copy_(absmax.reshape(-1))
            return
        places = _nearest(absmax / self.largest.clamp(min=torch.finfo(torch.float32).tiny), self.code)
        packed.absmax.copy_(self.indices[places.long()].reshape(-1))
        packed.nested_absmax.copy_(self.largest.reshape(-1)[::NESTED_BLOCKSIZE])
        packed.nested_offset.zero_()


def store_codes_(indices: Tensor, packed: PackedWeight) -> None:
    """Writes code indices `(rows, columns)`, uint8, two to a byte with the first in the upper half."""
    pairs = indices.reshape(-1, 2)
    packed.packed.copy_((pairs[:, 0] << 4) | pairs[:, 1])
