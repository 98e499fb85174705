"""The update of a weight, scaling * B A, as a merge adds it: in tiles, so that slices and wholes come out the same."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Delta:
    """scaling * left right, the update of a stored weight: left `(rows, rank)`, right `(rank, columns)`, both fp32.

    Sums are always computed in the same tiles of rows, so that a weight which is merged a slice at a time is, bit for
    bit, the one that is merged at once.
    """

    left: Tensor
    right: Tensor
    scaling: float

    TILE_ROWS = 64

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def transposed(self) -> Delta:
        """The update of the weight the other way round."""
        return Delta(self.right.T.contiguous(), self.left.T.contiguous(), self.scaling)

    def add_to_(self, rows: Tensor, first: int) -> Tensor:
        """Adds its rows from `first` on, a multiple of TILE_ROWS, to these (fp32), and returns them."""
        for start in range(0, rows.shape[0], self.TILE_ROWS):
            tile = rows[start : start + self.TILE_ROWS]
            left = self.left[first + start : first + start + tile.shape[0]]
            tile.addmm_(left, self.right, alpha=self.scaling)
        return rows

    def squared_norm(self) -> float:
        """The sum of its squares, from products of rank x rank values: tr(L^T L R R^T)."""
        left, right = self.left.double(), self.right.double()
        # Where the products cancel, rounding may leave less than nothing.
        return self.scaling * self.scaling * max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))
