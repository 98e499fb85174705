"""Tests of the inputs of layers: which are shared, which tokens count, and which layers are left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlora_lite.calibration.layer_inputs import BlockInputs, noted_inputs, token_count, token_rows

BATCH = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}


class Block(nn.Module):
    """`a` and `b` share an input, `c` gets that of one row, `d` is called twice, `e` never."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcde":
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        return y + self.c(x[:1]) + self.d(self.d(y))


def test_layers_with_one_input_share_its_products() -> None:
    block = Block()
    layers = dict(block.named_children())
    inputs = BlockInputs(layers)
    sums, drifts = torch.zeros(4, 4), torch.zeros(4, 4)
    for _ in range(2):
        plain, packed = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        with noted_inputs(layers) as of_plain:
            block(plain)
        with noted_inputs(layers) as of_packed:
            block(packed)
        inputs.add(of_plain, of_packed, BATCH)
        counted = BATCH["attention_mask"].bool()
        sums += packed[counted].T @ packed[counted]
        drifts += (plain - packed)[counted].T @ packed[counted]
    assert inputs.complete() == {"a": ["a", "b"]}
    assert inputs.incomplete == {"c", "d", "e"}
    products = inputs.products["a"]
    assert products.tokens == 10
    torch.testing.assert_close(products.hessian, sums)
    torch.testing.assert_close(products.drift, drifts)
    with noted_inputs(layers) as nothing:
        pass
    block(torch.randn(1, 1, 4))
    assert not nothing  # the hooks are gone


def test_padding_is_left_out() -> None:
    assert token_count(BATCH) == 5 and token_count({"input_ids": BATCH["input_ids"]}) == 6
    value = torch.arange(24.0).view(2, 3, 4)
    rows = token_rows(value, BATCH)
    assert rows is not None and rows[:, 0].tolist() == [0, 4, 12, 16, 20]
    assert token_rows(value[:1], BATCH) is None
    flat = token_rows(value.flatten(0, 1), {"input_ids": BATCH["input_ids"]})
    assert flat is not None and flat.shape == (6, 4)
