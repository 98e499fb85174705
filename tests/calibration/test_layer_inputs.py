"""Tests of the inputs of layers: which are shared, which tokens count, and which layers are left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlora_lite.calibration.layer_inputs import BlockInputs, input_of, noted_inputs, token_count, token_rows

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


def test_layers_with_one_input_are_a_group() -> None:
    block = Block()
    layers = dict(reversed([*block.named_children()]))
    inputs = BlockInputs(layers)
    counted = BATCH["attention_mask"].bool()
    values = [torch.randn(2, 3, 4) for _ in range(2)]
    for value in values:
        with noted_inputs(layers) as noted:
            block(value)
        inputs.add(noted, BATCH)
    assert inputs.groups() == [["a", "b"]]
    assert inputs.incomplete == {"c", "d", "e"}
    assert all(torch.equal(rows.pop("a"), value[counted]) for rows, value in zip(inputs.rows, values, strict=True))
    assert inputs.rows == [{}, {}]
    before = list(noted)
    block(torch.randn(1, 1, 4))
    assert list(noted) == before  # the hooks are gone


def test_the_input_of_a_layer_ends_the_run() -> None:
    block, x = Block(), torch.randn(2, 3, 4)
    ended: list[str] = []
    handle = block.d.register_forward_hook(lambda *_: ended.append("d"))
    found = input_of(block.c, lambda: block(x))
    assert found is not None and torch.equal(found, x[:1]) and not ended
    assert input_of(block.e, lambda: block(x)) is None and ended == ["d", "d"]
    handle.remove()
    assert not block.c._forward_pre_hooks and not block.e._forward_pre_hooks


def test_padding_is_left_out() -> None:
    assert token_count(BATCH) == 5 and token_count({"input_ids": BATCH["input_ids"]}) == 6
    value = torch.arange(24.0).view(2, 3, 4)
    rows = token_rows(value, BATCH)
    assert rows is not None and rows[:, 0].tolist() == [0, 4, 12, 16, 20]
    assert token_rows(value[:1], BATCH) is None
    flat = token_rows(value.flatten(0, 1), {"input_ids": BATCH["input_ids"]})
    assert flat is not None and flat.shape == (6, 4)
