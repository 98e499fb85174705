"""Updates of a weight: what merging an adapter, or exporting it, makes of W0.

    Delta         W0 + scaling * left right; with output norms m, its rows (those of `(out, in)`) scaled to norms m
    StackDelta    a Delta for each matrix of a stack
    Replacement   other values in place of W0, or of some of its rows

A weight is updated in fixed tiles of rows. A weight that is merged slice by slice therefore equals, bit for bit, one
that is merged at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_lite.compute.slicing import row_slices

# (start, stop) -> these rows of a tensor.
Rows = Callable[[int, int], Tensor]
# (first row, rows in fp32) of W0, in order.
RowSlices = Iterable[tuple[int, Tensor]]


@dataclass(frozen=True)
class Delta:
    """A low-rank update of a stored weight, W = W0 + scaling * left right.

    With `output_norms` m `(out,)`, the weights of each output are then scaled to the norm m: W -> m * W / ||W||.

    left: `(rows, rank)`, right: `(rank, columns)`, both fp32, in the orientation of the stored weight.
    by_columns: whether the outputs are the columns of the stored weight, as in `(in, out)`, and not its rows.
    norms: ||W|| of the columns, where `prepared` has computed it: a slice of rows does not give it.
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
        """The updates of the weight's matrices: this one alone."""
        return (self,)

    @property
    def low_rank(self) -> bool:
        """Whether left and right can be applied to an input without the weight."""
        return self.output_norms is None

    @property
    def additive(self) -> bool:
        """Whether W - W0 does not depend on W0."""
        return self.output_norms is None

    @property
    def transposed(self) -> Delta:
        """The update of the transposed weight."""
        left, right = self.right.T.contiguous(), self.left.T.contiguous()
        return Delta(left, right, self.scaling, self.output_norms, not self.by_columns)

    def _tiles(self, rows: Tensor, first: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields (rows of the weight as a slice, those rows of `rows`, those rows of left) for each tile."""
        for taken in row_slices(rows.shape[0], self.TILE_ROWS):
            tile = rows[taken].view(-1, self.right.shape[1])  # a kernel as a matrix
            part = slice(first + taken.start, first + taken.stop)
            yield part, tile, self.left[part]

    def add_to_(self, rows: Tensor, first: int) -> Tensor:
        """Updates these rows of W0 (fp32) in place and returns them. first: their index, a multiple of TILE_ROWS."""
        for part, tile, left in self._tiles(rows, first):
            tile.addmm_(left, self.right, alpha=self.scaling)
            if self.output_norms is None:
                continue
            if self.by_columns:
                assert self.norms is not None  # prepared
                tile.mul_(self.output_norms / self.norms)
            else:
                tile.mul_((self.output_norms[part] / _not_zero(torch.linalg.vector_norm(tile, dim=1)))[:, None])
        return rows

    def norms_of(self, slices: RowSlices) -> Tensor:
        """Returns ||W0 + scaling * left right|| of each output `(out,)` in fp32. The slices of W0 are not changed.

        A norm of 0 is given as 1, so that weights that are all 0 stay 0.
        """
        found = self.left.new_empty(self.left.shape[0])
        squares = torch.zeros(self.right.shape[1], dtype=torch.float64, device=self.right.device)
        for first, rows in slices:
            for part, tile, left in self._tiles(rows, first):
                total = torch.addmm(tile, left, self.right, alpha=self.scaling)
                if self.by_columns:
                    squares += total.square_().sum(0, dtype=torch.float64)
                else:
                    found[part] = torch.linalg.vector_norm(total, dim=1)
        return _not_zero(squares.sqrt().float() if self.by_columns else found)

    def prepared(self, slices: Callable[[], RowSlices]) -> Delta:
        """Returns this update with the norms of the columns, if it needs them. All of W0 is then read once."""
        if self.output_norms is None or not self.by_columns:
            return self
        return replace(self, norms=self.norms_of(slices()))

    def squared_norm(self) -> float:
        """Returns ||scaling * L R||^2 = scaling^2 tr(L^T L R R^T), from products of `(rank, rank)`."""
        left, right = self.left.double(), self.right.double()
        # Where the products cancel, rounding may give a negative sum.
        return self.scaling * self.scaling * max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))


@dataclass(frozen=True)
class Replacement:
    """Trained values that replace a weight, or some of its rows.

    values: (start, stop) -> these rows of the trained values. indices: the rows of the weight that they replace; None:
    all. owner: the object that holds the values. Two tied weights with the same owner are still tied. stack: the number
    of matrices, if the weight is a stack that is read matrix by matrix.
    """

    values: Rows
    owner: object
    indices: tuple[int, ...] | None = None
    stack: int | None = None

    low_rank = False
    additive = False

    @property
    def matrices(self) -> tuple[Replacement, ...]:
        """The updates of the weight's matrices: this one alone, or one for each matrix of a stack."""
        if self.stack is None:
            return (self,)

        @functools.lru_cache(maxsize=1)  # rows are read matrix by matrix, so one of them is held at a time
        def whole(index: int) -> Tensor:
            return self.values(index, index + 1)[0]

        def rows_of(index: int) -> Rows:
            return lambda start, stop: whole(index)[start:stop]

        return tuple(Replacement(rows_of(index), self.owner) for index in range(self.stack))

    def add_to_(self, rows: Tensor, first: int) -> Tensor:
        """Writes the trained values into these rows of W0 (fp32), from row `first` on, and returns them."""
        if self.indices is None:
            stop = first + rows.shape[0] if rows.dim() else 1
            return rows.copy_(self.values(first, stop).reshape(rows.shape))
        for place, index in enumerate(self.indices):
            if first <= index < first + rows.shape[0]:
                rows[index - first] = self.values(place, place + 1)[0].to(rows)
        return rows

    def prepared(self, slices: Callable[[], RowSlices]) -> Replacement:
        """Returns itself: it needs nothing of W0."""
        return self


@dataclass(frozen=True)
class StackDelta:
    """The updates of the matrices of a stack `(matrices, rows, columns)`. None of them has output norms."""

    matrices: tuple[Delta, ...]

    low_rank = False
    additive = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.matrices), *self.matrices[0].shape)

    def add_to_(self, stack: Tensor, first: int) -> Tensor:
        """Adds them to these matrices (fp32), from matrix `first` on, and returns the matrices."""
        for matrix, delta in zip(stack, self.matrices[first : first + len(stack)], strict=True):
            delta.add_to_(matrix, 0)
        return stack

    def prepared(self, slices: Callable[[], RowSlices]) -> StackDelta:
        """Returns itself: it needs nothing of W0."""
        return self

    def squared_norm(self) -> float:
        """Returns the sum of squares of all updates."""
        return sum(delta.squared_norm() for delta in self.matrices)


# The update by an adapter, and any update of a weight.
AdapterDelta = Delta | StackDelta
Update = AdapterDelta | Replacement


def _not_zero(norms: Tensor) -> Tensor:
    return norms.masked_fill(norms == 0, 1)
