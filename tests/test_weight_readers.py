"""Tests of finding layers whose weight is read instead of the layer being called."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lite.weight_readers import described_reads, weights_read


class Block(nn.Module):
    def __init__(self, exact: bool = False) -> None:
        super().__init__()
        self.exact, self.config = exact, SimpleNamespace(parts=1, clip=None)
        self.attention, self.called, self.guarded, self.clipped, self.cast, self.other = (
            nn.ModuleDict({"output": nn.Linear(4, 4)}),
            *(nn.Linear(4, 4) for _ in range(5)),
        )

    def init_weights(self) -> None:
        nn.init.zeros_(self.called.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.cast.weight.dtype))
        if self.config.parts > 1 and self.exact:
            x = F.linear(x, self.guarded.weight[:, :2])
        if self.config.clip is not None and self.training:
            self.clipped.weight.data.clamp_(-1, 1)
        return x @ self.other.weight if not self.exact else x


class Heir(Block):
    """Replaces the method that reads `other`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.exact else self.called(x)


class Model(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def rescale(self) -> None:
        for block in self.blocks:
            block.attention.output.weight.div_(2)


def test_reads_are_found_by_path_unless_their_condition_cannot_hold() -> None:
    block = Block()
    model = Model(block)
    usual = {"blocks.0.attention.output": "Model.rescale", "blocks.0.other": "Block.forward"}
    assert weights_read(model) == usual
    block.config.clip = 2.0  # the mode is not known
    assert weights_read(model) == {**usual, "blocks.0.clipped": "Block.forward"}
    block.config.parts = 2
    assert "blocks.0.guarded" not in weights_read(model)
    block.exact = True
    assert weights_read(model).keys() == {"blocks.0.attention.output", "blocks.0.guarded", "blocks.0.clipped"}
    block.config.parts = None  # not comparable: it may run
    assert "blocks.0.guarded" in weights_read(model)


def test_a_method_that_is_overridden_does_not_count() -> None:
    assert weights_read(Heir()) == {}
    model = Model(Block())
    model.rescale = lambda: None  # type: ignore[method-assign]
    assert weights_read(model).keys() == {"blocks.0.other"}


def test_sentences_leave_out_embeddings_and_layers_that_are_called() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.a = nn.Embedding(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.wte(x) @ self.a.weight, self.wte.weight)

    assert weights_read(Tied()).keys() == {"wte", "a"}
    assert described_reads(Tied(), ["wte", "a"]) == [
        "a: Tied.forward reads its weight instead of calling it, so an adapter would have no effect"
    ]


def test_kernels_that_are_not_installed_read_nothing(small_model: Callable[..., Any]) -> None:
    """Mamba gives x_proj and out_proj to a kernel; without its library, a function that returns None gets them."""
    ends = {name.rpartition(".")[2] for name in weights_read(small_model("MambaConfig", state_size=8))}
    assert ends == {"dt_proj", "conv1d"}


def test_classes_without_source_are_passed_over() -> None:
    names: dict[str, Any] = {"nn": nn, "torch": torch}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return self.a.weight", names)
    made = names["Made"]()
    made.a = nn.Linear(2, 2)
    assert weights_read(made) == {}
