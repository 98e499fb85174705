"""Chooses the codes and the absmax of a 4-bit weight by the error of the layer's output, not by that of its values.

GPTQ (arXiv:2210.17323): columns are rounded one after the other. The error of each is passed on to the columns that are
not rounded yet, so that they make up for it as well as they can:

    e_j = (w_j - q_j) / U_jj,        w_k -= e_j U_jk  for k > j         U^T U = (H + d)^-1,  H of input_products.py

and sum(e_j^2) is the error of the output. Rows do not depend on each other, and go through this together.

The absmax of a block is chosen by that sum: the columns of the block are rounded with each of `FACTORS` times the
largest magnitude in the block, of both signs, and the absmax with the smallest sum stays. Which one that is cannot be
told without rounding: errors that are passed on within the block make up for a grid that is too narrow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lite.calibration.code_grid import AbsmaxGrid, CodeGrid, store_codes_
from qlora_lite.calibration.input_products import ColumnOrder, InputProducts
from qlora_lite.calibration.report import LayerErrors
from qlora_lite.compute.slicing import rows_that_fit
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.signals import check_signals

# Absmax that are tried for a block, as shares of its largest magnitude.
FACTORS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05)
# How far a weight is moved towards the one whose outputs are those of the 16-bit model, before it is packed.
SHIFT = 0.5
# Columns whose errors are passed on one by one; those behind them get the errors of all of these by one product.
COLUMNS_AT_ONCE = 8
# Rows, spread evenly, of which the error is measured: for all of them it would take as long as packing them.
ERROR_ROWS = 512
# Values of a block, for all absmax that are tried, at once: they stay in the caches.
VALUES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class FeedbackResult:
    """A weight packed by rounding and with feedback, and what each changes on the calibration text."""

    rounded: PackedWeight
    packed: PackedWeight
    errors: LayerErrors


@dataclass(frozen=True)
class _Rounded:
    """A block rounded with each absmax that was tried, of `(tried, rows)`.

    places: of the code values, `(columns, tried, rows)`. errors: e, in that shape. loss: sum of e^2, `(tried, rows)`.
    """

    places: Tensor
    errors: Tensor
    loss: Tensor


def _round_block(block: Tensor, absmax: Tensor, factor: Tensor, grid: CodeGrid) -> _Rounded:
    """Rounds the columns of a block `(columns, rows)` with each absmax `(tried, rows)`. factor: U of these columns."""
    columns, tried = len(block), len(absmax)
    left = block.unsqueeze(1).repeat(1, tried, 1)
    places = torch.empty(left.shape, dtype=torch.int32, device=left.device)
    errors = torch.empty_like(left)
    inverse = torch.where(absmax == 0, absmax, 1 / absmax)
    for first in range(0, columns, COLUMNS_AT_ONCE):
        last = min(first + COLUMNS_AT_ONCE, columns)
        for column in range(first, last):
            value = left[column]
            places[column] = grid.places(value * inverse)
            error = value.sub_(grid.at(places[column]) * absmax).div_(factor[column, column])
            errors[column] = error
            behind = factor[column, column + 1 : last].view(-1, 1, 1)
            left[column + 1 : last].addcmul_(behind, error, value=-1)
        passed_on = factor[first:last, last:columns].T @ errors[first:last].flatten(1)
        left[last:] -= passed_on.view(columns - last, *absmax.shape)
    return _Rounded(places, errors, errors.square().sum(0))


def _chosen_absmax(block: Tensor, factor: Tensor, grid: CodeGrid, statistics: AbsmaxGrid, number: int) -> Tensor:
    """Returns the absmax of each row, `(rows,)`, with which a block `(columns, rows)` loses least."""
    signs = (1.0,) if grid.is_symmetric else (1.0, -1.0)
    factors = torch.tensor([sign * share for sign in signs for share in FACTORS]).to(block)
    tried = statistics.rounded(factors.unsqueeze(1) * block.abs().amax(0), number)
    best = _round_block(block, tried, factor, grid).loss.argmin(0, keepdim=True)
    return tried.gather(0, best).squeeze(0)


def _feed_back(
    weight: Tensor, order: ColumnOrder, grid: CodeGrid, statistics: AbsmaxGrid, blocksize: int
) -> tuple[Tensor, Tensor]:
    """Returns code indices `(rows, columns)`, uint8, and absmax `(rows, blocks)` of rows of a weight.

    statistics: of these rows.
    """
    left = weight.T[order.columns]  # `(columns, rows)`, a copy, in the order of packing
    indices = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    absmax = weight.new_empty((len(weight), len(order.blocks)))
    for place, number in enumerate(order.blocks):
        first, last = place * blocksize, (place + 1) * blocksize
        block, factor = left[first:last], order.factor[first:last, first:last]
        chosen = _chosen_absmax(block, factor, grid, statistics, number)
        found = _round_block(block, chosen.unsqueeze(0), factor, grid)
        absmax[:, number] = chosen
        indices[order.columns[first:last]] = grid.indices[found.places.squeeze(1).long()]
        left[last:] -= order.factor[first:last, last:].T @ found.errors.squeeze(1)
    return indices.T.contiguous(), absmax


def shifted(weight: Tensor, products: InputProducts, order: ColumnOrder, share: float) -> Tensor:
    """Returns W + share * W D (H + d)^-1, part of the way to the weight whose outputs are the 16-bit model's.

    With the share 1 and no damping it is the V with the least |Xq V^T - X16 W^T|. It fits the calibration text better
    than other text, hence only a part of the way (arXiv:2504.02692 goes all of it).
    """
    return weight + share * order.inverse_product(weight @ products.drift)


def _largest(weight: Tensor, blocksize: int) -> Tensor:
    """Returns the largest magnitude of each block, `(rows, blocks)`."""
    return weight.view(len(weight), -1, blocksize).abs().amax(2)


def empty_like(packed: PackedWeight) -> PackedWeight:
    """Returns a packed weight of the same layout, to be filled."""
    rows, columns = packed.shape
    made = PackedWeight((rows, columns), packed.format, packed.blocksize, packed.double_quant, packed.device)
    made.plain_dtype = packed.plain_dtype
    return made


def pack_with_feedback(
    weight: Tensor,
    products: InputProducts,
    order: ColumnOrder,
    config: QuantConfig,
    format: str,
    name: str = "weight",
) -> FeedbackResult:
    """Packs a weight `(rows, columns)` for its inputs. The columns must be a multiple of `config.blocksize`.

    order: that of the products, for this block size; layers with one input share both.

    Raises QuantizationError, naming the weight, for values that are not finite.
    """
    plain = PackedWeight.of(weight, config, format, name)
    original = weight.to(products.hessian.dtype)
    moved = shifted(original, products, order, SHIFT)
    grid = CodeGrid.of(format, moved)
    statistics = AbsmaxGrid.of(_largest(moved, config.blocksize), config.double_quant)
    packed = empty_like(plain)
    indices = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    absmax = moved.new_empty((len(weight), len(order.blocks)))
    count = rows_that_fit(VALUES_AT_ONCE, 2 * len(FACTORS) * config.blocksize)
    for first in range(0, len(weight), count):
        check_signals()
        rows = slice(first, first + count)
        indices[rows], absmax[rows] = _feed_back(moved[rows], order, grid, statistics.of_rows(rows), config.blocksize)
    store_codes_(indices, packed)
    statistics.store_(absmax, packed)
    sample = slice(None, None, max(1, len(weight) // ERROR_ROWS))
    some = original[sample]
    whole = products.error(some) or 1.0
    errors = [products.error(each.dequantize(original.dtype)[sample] - some) / whole for each in (plain, packed)]
    return FeedbackResult(plain, packed, LayerErrors(*errors))
