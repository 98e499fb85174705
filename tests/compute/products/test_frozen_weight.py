"""Tests of products with a frozen weight in slices, against the product with the whole weight."""

from __future__ import annotations

import pytest
import torch

from qlora_lite.compute.products import frozen_weight
from qlora_lite.compute.products.frozen_weight import base_product, base_product_back


@pytest.mark.parametrize("slice_bytes", [1 << 20, 3 * 8 * 8])
def test_products_are_those_of_the_whole_weight(slice_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_weight, "SLICE_BYTES", slice_bytes)
    torch.manual_seed(0)
    weight, bias, rows = torch.randn(7, 8), torch.randn(7).double(), torch.randn(5, 8).double()
    plain = torch.nn.functional.linear(rows, weight.double(), bias)
    torch.testing.assert_close(base_product(rows, weight, bias), plain)
    torch.testing.assert_close(base_product(rows, weight, None), plain - bias)
    back = plain @ weight.double()
    torch.testing.assert_close(base_product_back(plain, weight), back)
    total = rows.clone()
    assert base_product_back(plain, weight, total) is total
    torch.testing.assert_close(total, rows + back)
