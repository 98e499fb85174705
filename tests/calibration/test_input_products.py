"""Tests of the products of inputs and of the order of columns."""

from __future__ import annotations

import torch

from qlora_lite.calibration.input_products import InputProducts


def test_batches_add_up() -> None:
    packed, plain = torch.randn(30, 8), torch.randn(30, 8)
    products = InputProducts(8, packed.device, torch.float64)
    for rows in (slice(0, 11), slice(11, 30)):
        products.add(packed[rows], plain[rows])
    wide, other = packed.double(), plain.double()
    torch.testing.assert_close(products.hessian, wide.T @ wide)
    torch.testing.assert_close(products.drift, (other - wide).T @ wide)
    assert products.tokens == 30
    difference = torch.randn(5, 8, dtype=torch.float64)
    assert abs(products.error(difference) - float((wide @ difference.T).square().sum())) < 1e-9


def test_the_factor_is_that_of_the_inverse_in_the_order_of_the_columns() -> None:
    inputs = torch.randn(200, 12, dtype=torch.float64) * torch.tensor([3, 1, 2, 1, 5, 4, 1, 1, 9, 8, 7, 6.0])
    products = InputProducts(12, inputs.device, torch.float64)
    products.add(inputs, inputs)
    order = products.order(4)
    assert (order.blocks == [2, 1, 0] and order.columns.tolist() == [8, 9, 10, 11, 4, 5, 6, 7, 0, 2, 1, 3]) or set(
        order.columns[4:8].tolist()
    ) == {4, 5, 6, 7}
    diagonal = products.hessian.diagonal()
    for block in range(3):
        within = diagonal[order.columns[4 * block : 4 * block + 4]]
        assert torch.equal(within, within.sort(descending=True)[0])
    damped = products.hessian + 0.01 * diagonal.mean() * torch.eye(12)
    inverse = torch.linalg.inv(damped)
    assert torch.equal(order.factor, order.factor.triu())
    torch.testing.assert_close(order.factor.T @ order.factor, inverse[order.columns][:, order.columns])
    rows = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(order.inverse_product(rows), rows @ inverse)


def test_fewer_tokens_than_columns_are_damped() -> None:
    inputs = torch.randn(3, 64)
    products = InputProducts(64, inputs.device)
    products.add(inputs, inputs)
    assert products.order(64).factor.isfinite().all()
