"""What an adapter makes of a weight, as a merge computes it: in tiles, so that slices and wholes come out the same.

    W = W0 + scaling * B A
    W' = m * W / ||W||              norms of the rows of `(out, in)`, for a variant of LoRA that gives them norms m

A stack of matrices has an update for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora_lite.compute.slicing import row_slices

Rows = Callable[[int, int], Tensor]
Pieces = Iterable[tuple[int, Tensor]]


@dataclass(frozen=True)
class Delta:
    """scaling * left right, the update of a stored weight: left `(rows, rank)`, right `(rank, columns)`, both fp32.

    output_norms: the norms `(out,)` in fp32 that the weights of each output are then given, if any: those of the rows
    of the stored weight, or of its columns with `by_columns`, where it is stored as `(in, out)`. norms: those that the
    columns have before, for which a slice of rows is not enough (`measured`).

    Sums are always computed in the same tiles of rows, so that a weight which is merged a slice at a time is, bit for
    bit, the one that is merged at once.
    """

    left: Tensor
    right: Tensor
    scaling: float
    output_norms: Tensor | None = None
    by_columns: bool = False
    norms: Tensor | None = None

    TILE_ROWS = 64

    @property
    def shape(self) -> tuple[int, ...]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def matrices(self) -> tuple[Delta, ...]:
        """The update of each matrix of the weight, which is one."""
        return (self,)

    @property
    def low_rank(self) -> bool:
        """Whether it can be applied to an input apart from the weight, as a product with left and right."""
        return self.output_norms is None

    @property
    def additive(self) -> bool:
        """Whether it adds the same to every weight, so that its size does not depend on W0."""
        return self.output_norms is None

    @property
    def transposed(self) -> Delta:
        """The update of the weight the other way round."""
        left, right = self.right.T.contiguous(), self.left.T.contiguous()
        return Delta(left, right, self.scaling, self.output_norms, not self.by_columns)

    def _tiles(self, rows: Tensor, first: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(which rows of the weight, those of `rows`, those of left) of each tile."""
        for taken in row_slices(rows.shape[0], self.TILE_ROWS):
            tile = rows[taken].view(-1, self.right.shape[1])  # a kernel as a matrix
            part = slice(first + taken.start, first + taken.stop)
            yield part, tile, self.left[part]

    def add_to_(self, rows: Tensor, first: int) -> Tensor:
        """Makes what the adapter makes of these rows of W0 (fp32), from `first` on, a multiple of TILE_ROWS."""
        for part, tile, left in self._tiles(rows, first):
            tile.addmm_(left, self.right, alpha=self.scaling)
            if self.output_norms is None:
                continue
            if self.by_columns:
                assert self.norms is not None  # measured
                tile.mul_(self.output_norms / self.norms)
            else:
                tile.mul_((self.output_norms[part] / _not_zero(torch.linalg.vector_norm(tile, dim=1)))[:, None])
        return rows

    def norms_of(self, pieces: Pieces) -> Tensor:
        """Norms of W0 + scaling * B A by rows, or columns; pieces: (first row, rows of W0 in fp32), left as they are.

        1 in place of 0, so that a row of zeros stays one.
        """
        found = self.left.new_empty(self.left.shape[0])
        squares = torch.zeros(self.right.shape[1], dtype=torch.float64, device=self.right.device)
        for first, rows in pieces:
            for part, tile, left in self._tiles(rows, first):
                total = torch.addmm(tile, left, self.right, alpha=self.scaling)
                if self.by_columns:
                    squares += total.square_().sum(0, dtype=torch.float64)
                else:
                    found[part] = torch.linalg.vector_norm(total, dim=1)
        return _not_zero(squares.sqrt().float() if self.by_columns else found)

    def prepared(self, pieces: Callable[[], Pieces]) -> Delta:
        """With the norms of the columns, for which all of W0 is read once if they are needed."""
        if self.output_norms is None or not self.by_columns:
            return self
        return replace(self, norms=self.norms_of(pieces()))

    def squared_norm(self) -> float:
        """The sum of squares of scaling * B A, from products of rank x rank values: tr(L^T L R R^T)."""
        left, right = self.left.double(), self.right.double()
        # Where the products cancel, rounding may leave less than nothing.
        return self.scaling * self.scaling * max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))


@dataclass(frozen=True)
class Replaced:
    """A weight that is trained itself, or some rows of it: these values stand in its place, or theirs.

    values: (start, stop) -> rows of what was trained. indices: the rows of the weight that these are; None for all.
    owner: what holds the values; two tied weights with the same one are still tied.
    """

    values: Rows
    owner: Any
    indices: tuple[int, ...] | None = None

    low_rank = False
    additive = False

    @property
    def matrices(self) -> tuple[Replaced, ...]:
        """Itself, for a weight that is one matrix, or taken as one."""
        return (self,)

    def add_to_(self, rows: Tensor, first: int) -> Tensor:
        """Puts what was trained into these rows of W0 (fp32), from `first` on."""
        if self.indices is None:
            stop = first + rows.shape[0] if rows.dim() else 1
            return rows.copy_(self.values(first, stop).reshape(rows.shape))
        for place, index in enumerate(self.indices):
            if first <= index < first + rows.shape[0]:
                rows[index - first] = self.values(place, place + 1)[0].to(rows)
        return rows

    def prepared(self, pieces: Callable[[], Pieces]) -> Replaced:
        """Nothing of W0 needs to be known."""
        return self


@dataclass(frozen=True)
class StackDelta:
    """The updates of the matrices of a stack, `(matrices, rows, columns)`; none of them gives norms."""

    matrices: tuple[Delta, ...]

    low_rank = False
    additive = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.matrices), *self.matrices[0].shape)

    def add_to_(self, stack: Tensor, first: int) -> Tensor:
        """Adds them to the matrices (fp32) from `first` on."""
        for matrix, delta in zip(stack, self.matrices[first : first + len(stack)], strict=True):
            delta.add_to_(matrix, 0)
        return stack

    def prepared(self, pieces: Callable[[], Pieces]) -> StackDelta:
        """Itself: nothing of W0 is needed."""
        return self

    def squared_norm(self) -> float:
        """The sum of squares of all updates."""
        return sum(delta.squared_norm() for delta in self.matrices)


# What A and B make of a weight, and all that can become of one.
AdapterDelta = Delta | StackDelta
Update = AdapterDelta | Replaced


def _not_zero(norms: Tensor) -> Tensor:
    return norms.masked_fill(norms == 0, 1)
