"""What is remembered of a layer's inputs while calibration text runs through the model: two matrices of their products.

    H = Xq^T Xq                 Xq (tokens, columns): the inputs that the layer gets behind packed layers
    D = (X16 - Xq)^T Xq         X16: those that it gets in the 16-bit model

For rows q of the packed weight and w of the plain one, |Xq (q - w)|^2 = (q - w) H (q - w)^T is the error of the layer's
output. Layers with one input share both matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lite.errors import QuantizationError

# Shares of the mean of H's diagonal that are added to it; the next one is tried if H is not positive definite so.
DAMPING = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class ColumnOrder:
    """The order in which columns are packed, and the factor of the inverse of H in that order.

    blocks: numbers of the blocks, that with the largest inputs first. columns: of all columns, those of a block side by
    side, within a block by falling inputs. factor: U `(columns, columns)`, upper triangular, with U^T U = (H + d)^-1.
    """

    blocks: list[int]
    columns: Tensor
    factor: Tensor

    def inverse_product(self, rows: Tensor) -> Tensor:
        """Returns rows (H + d)^-1 for rows `(n, columns)`, whose columns have the order of the weight."""
        product = rows[:, self.columns] @ self.factor.T @ self.factor
        return torch.empty_like(product).index_copy_(1, self.columns, product)


class InputProducts:
    """H and D, `(columns, columns)` in fp32, summed over batches of inputs."""

    def __init__(self, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.hessian = torch.zeros((columns, columns), dtype=dtype, device=device)
        self.drift = torch.zeros_like(self.hessian)
        self.tokens = 0

    def add(self, packed: Tensor, plain: Tensor) -> None:
        """Adds the inputs of some tokens, `(tokens, columns)`, behind packed layers and in the 16-bit model."""
        inputs = packed.to(self.hessian.dtype)
        self.hessian.addmm_(inputs.T, inputs)
        if plain is not packed:
            self.drift.addmm_((plain.to(self.hessian.dtype) - inputs).T, inputs)
        self.tokens += len(inputs)

    def error(self, difference: Tensor) -> float:
        """Returns the sum over rows of d H d^T, for differences of weights `(rows, columns)`."""
        return float(((difference @ self.hessian) * difference).sum(dtype=torch.float64))

    def _factored(self, columns: Tensor) -> Tensor:
        """Returns the factor of `ColumnOrder`. Frees each matrix as soon as the next one is made: they can be large."""
        backward = columns.flip(0)
        for damping in DAMPING:
            damped = self.hessian[backward.unsqueeze(1), backward]
            diagonal = damped.diagonal()
            diagonal += damping * float(diagonal.mean()) + torch.finfo(torch.float32).tiny
            lower, failed = torch.linalg.cholesky_ex(damped)
            del damped, diagonal
            if not failed:
                # With L L^T = H in the opposite order, R = the opposite order of L is upper triangular and H = R R^T.
                upper = lower.flip(0, 1)
                del lower
                one = torch.eye(len(columns)).to(upper)
                factor: Tensor = torch.linalg.solve_triangular(upper, one, upper=True)
                return factor
        raise QuantizationError("the inputs of a layer hold NaN or infinity on the calibration text")

    def order(self, blocksize: int) -> ColumnOrder:
        """Returns the order of the columns, a multiple of `blocksize`.

        Raises QuantizationError for inputs that are not finite.

        Columns with large inputs come first: their errors matter most, and the columns after them can make up for them.
        """
        within = self.hessian.diagonal().view(-1, blocksize).argsort(1, descending=True)
        blocks = self.hessian.diagonal().view(-1, blocksize).sum(1).argsort(descending=True)
        starts = torch.arange(len(blocks), device=within.device).unsqueeze(1) * blocksize
        columns = (within + starts)[blocks].reshape(-1)
        return ColumnOrder(blocks.tolist(), columns, self._factored(columns))
