"""x W^T with both sides in int8, large features apart: LLM.int8() (arXiv:2208.07339, section 3).

W comes as int8 codes with an absmax for each row. Each row of x is divided by its own absmax and rounded to int8; the
sums of products are exact integers, and one multiplication by both absmax gives y. Columns of x in which a magnitude
reaches OUTLIER would spoil the steps of all others: they are left out and multiplied in x's own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qlora_lite.compute.slicing import row_slices, rows_that_fit

OUTLIER = 6.0  # the paper's threshold
LARGEST = 127
# What an accelerator's integer product asks of its shapes: more rows than this, columns in multiples of this.
LEAST_ROWS, MULTIPLE = 17, 8
SLICE_VALUES = 1 << 19  # rows are converted in slices that stay in the caches


def _slices(rows: int, columns: int) -> Iterator[slice]:
    return row_slices(rows, rows_that_fit(SLICE_VALUES, columns))


def outlier_columns(x: Tensor) -> Tensor:
    """The columns of x with a magnitude of OUTLIER or more. Fake tensors have no values, and so none."""
    if isinstance(x, FakeTensor):
        return torch.empty(0, dtype=torch.int64, device=x.device)
    return x.abs().amax(0).ge(OUTLIER).nonzero().squeeze(1)


def quantize_rows(x: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of x `(rows, columns)`, and the absmax of each row `(rows, 1)`; the columns `without` are zero."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    absmax = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    for part in _slices(*x.shape):
        rows = x[part].to(torch.float32, copy=True)
        if without.numel():
            rows.index_fill_(1, without, 0)
        largest = rows.abs().amax(1, keepdim=True)
        absmax[part] = largest
        codes[part] = rows.mul_(LARGEST / largest.clamp_(min=torch.finfo(torch.float32).tiny)).round_()
    return codes, absmax


def suits(rows: int, shape: tuple[int, ...]) -> bool:
    """Whether every device multiplies so many rows with a weight of this shape in integers."""
    return rows >= LEAST_ROWS and all(size % MULTIPLE == 0 for size in shape)


def int8_product(x: Tensor, weight_codes: Tensor, weight_absmax: Tensor) -> Tensor:
    """x W^T: x `(rows, in)` of any float dtype, codes `(out, in)` int8, absmax `(out,)` -> `(rows, out)` as x."""
    apart = outlier_columns(x)
    codes, absmax = quantize_rows(x, apart)
    sums = torch._int_mm(codes, weight_codes.T)
    step = weight_absmax / LARGEST**2
    y = torch.empty(sums.shape, dtype=x.dtype, device=x.device)
    for part in _slices(*sums.shape):
        y[part] = (sums[part] * absmax[part]).mul_(step)
    if apart.numel():
        columns = weight_codes.index_select(1, apart) * (weight_absmax / LARGEST).unsqueeze(1)
        y.addmm_(x.index_select(1, apart), columns.to(x.dtype).T)
    return y
