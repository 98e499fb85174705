"""x W^T with both sides in int8, large features apart: LLM.int8() (arXiv:2208.07339, section 3).

    Y_ij = (sum over k not in O of q_ik w_jk) * a_i b_j / 127^2 + sum over k in O of x_ik W_jk

W is given as int8 codes w with an absmax b for each row. Each row of x is divided by its own absmax a and rounded to
int8 codes q; the sums of products are exact integers. A column of x with a magnitude of OUTLIER or more would coarsen
the steps of all others: such columns (the set O) are left out, and multiplied in the dtype of x.

A CPU without instructions for int8 takes 30 times as long for the integers as for fp32 (choices.py). In fp32, products
of codes are exact too, and so are their sums up to 1040 columns; sums of more are rounded, to 24 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qlora_lite.choices import FP32, INTEGER_PRODUCTS, chosen
from qlora_lite.compute.slicing import row_slices, rows_that_fit

OUTLIER = 6.0  # the paper's threshold
LARGEST = 127
# Shapes that an accelerator's integer product takes: at least LEAST_ROWS rows, sizes in multiples of MULTIPLE.
LEAST_ROWS, MULTIPLE = 17, 8
SLICE_VALUES = 1 << 19  # rows are converted in slices that stay in the caches
FP32_VALUES = 1 << 22  # of W that are converted at once for a product in fp32


def _slices(rows: int, columns: int) -> Iterator[slice]:
    return row_slices(rows, rows_that_fit(SLICE_VALUES, columns))


def outlier_columns(x: Tensor) -> Tensor:
    """Returns the columns of x with a magnitude of OUTLIER or more; none for fake tensors, which have no values."""
    if isinstance(x, FakeTensor):
        return torch.empty(0, dtype=torch.int64, device=x.device)
    return x.abs().amax(0).ge(OUTLIER).nonzero().squeeze(1)


def quantize_rows(x: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 codes of x `(rows, columns)`, 0 in the columns `without`, and absmax of rows `(rows, 1)`."""
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
    """Whether every device can multiply this number of rows with a weight of this shape in integers."""
    return rows >= LEAST_ROWS and all(size % MULTIPLE == 0 for size in shape)


def _sums(codes: Tensor, weight_codes: Tensor) -> Tensor:
    """Returns the sums of products of codes, `(rows, out)`, in int32 or fp32."""
    if chosen(INTEGER_PRODUCTS) != FP32:
        return torch._int_mm(codes, weight_codes.T)
    rows, (height, columns) = codes.float(), weight_codes.shape
    sums = rows.new_empty((rows.shape[0], height))
    for part in row_slices(height, rows_that_fit(FP32_VALUES, columns), weight_codes):
        sums[:, part] = rows @ weight_codes[part].float().T
    return sums


def int8_product(x: Tensor, weight_codes: Tensor, weight_absmax: Tensor) -> Tensor:
    """Returns x W^T in the dtype of x: x `(rows, in)`, weight_codes `(out, in)`, weight_absmax `(out,)`."""
    apart = outlier_columns(x)
    codes, absmax = quantize_rows(x, apart)
    sums = _sums(codes, weight_codes)
    step = weight_absmax / LARGEST**2
    y = torch.empty(sums.shape, dtype=x.dtype, device=x.device)
    for part in _slices(*sums.shape):
        y[part] = (sums[part] * absmax[part]).mul_(step)
    if apart.numel():
        columns = weight_codes.index_select(1, apart) * (weight_absmax / LARGEST).unsqueeze(1)
        y.addmm_(x.index_select(1, apart), columns.to(x.dtype).T)
    return y
