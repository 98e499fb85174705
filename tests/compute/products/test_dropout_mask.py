"""Tests of dropout masks that are drawn from a seed."""

from __future__ import annotations

import pytest
import torch

from qlora_lite.compute.products.dropout_mask import apply_mask, dropout_mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_mask_drops_what_it_says_and_changes_nothing_else(dtype: torch.dtype) -> None:
    x = torch.randn(300, 500).to(dtype)
    mask = dropout_mask(x, 0.2, seed=3)
    kept = apply_mask(x, mask)
    assert torch.equal(kept, torch.where(mask.ne(0), x, 0))
    assert (kept == 0).double().mean() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(mask, dropout_mask(x, 0.2, seed=3)) and not torch.equal(mask, dropout_mask(x, 0.2, seed=4))
