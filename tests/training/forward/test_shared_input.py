"""Tests of layers that are multiplied at once: which modules share an input, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from qlora_lite import LoraConfig, add_lora_
from qlora_lite.compute import lora_linear
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.training.forward.shared_input import prepare_outputs, shares_input, with_shared_input

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Granite"])
def test_attention_of_these_families_shares_its_input(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(vocab_size=16, num_key_value_heads=2, pad_token_id=0, **SIZES)
    model = getattr(transformers, f"{family}Model")(config)
    assert [name for name, module in model.named_modules() if shares_input(module)] == ["layers.0.self_attn"]


class Attention(nn.Module):
    """Reads its input by three layers: all from x, or one from something else, or with one left out."""

    def __init__(self, kind: str = "shared") -> None:
        super().__init__()
        self.kind = kind
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, out) for out in (6, 4, 4))

    def forward(self, x: Tensor, other: object = None) -> Tensor:
        if self.kind == "fails":
            raise ValueError(self.kind)
        read = [self.q_proj(x)]
        if self.kind != "lacks one":
            read.append(self.k_proj(x * 2 if self.kind == "other" else x))
        return torch.cat((*read, self.v_proj(x)), -1)


@pytest.mark.parametrize("kind", ["shared", "other", "lacks one", "fails"])
def test_only_layers_that_read_the_same_tensor_share_it(kind: str) -> None:
    assert shares_input(Attention(kind)) == (kind == "shared")
    assert not shares_input(nn.Linear(2, 2)) and not shares_input(nn.Sequential())


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": Attention()})
    add_lora_(model, LoraConfig(rank=2, target_modules=["q_proj", "k_proj", "v_proj"], **options))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            nn.init.normal_(layer.lora_B)
    return model.train()["attention"]


def gradients(attention: Any, x: Tensor, shared: bool) -> list[Tensor]:
    torch.manual_seed(1)
    y = with_shared_input(attention, attention.forward, "x", x) if shared else attention(x)
    trained = [parameter for parameter in attention.parameters() if parameter.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *trained])]


@pytest.mark.parametrize(
    ("options", "nodes"),
    [
        ({}, 1),
        ({"rank_pattern": {"k_proj": 3}}, 1),
        ({"variant": "lora_bias"}, 1),
        ({"variant": "dora"}, 3),
        ({"dropout": 0.3}, 3),
    ],
)
def test_outputs_and_gradients_are_those_of_the_layers_apart(
    options: dict[str, Any], nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers with dropout or magnitudes are computed apart; others by one node."""
    attention, x = adapted(**{"dropout": 0.0} | options), torch.randn(2, 20, 8, requires_grad=True)
    calls: list[int] = []
    node = lora_linear._AdaptedLinear
    counted = type("Counted", (), {"apply": staticmethod(lambda *given: (calls.append(1), node.apply(*given))[1])})
    wanted = gradients(attention, x, shared=False)
    monkeypatch.setattr(lora_linear, "_AdaptedLinear", counted)
    found = gradients(attention, x, shared=True)
    assert len(calls) == nodes and not hasattr(x, "outputs")
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_an_output_is_not_used_for_another_input() -> None:
    attention, x = adapted(dropout=0.0), torch.randn(2, 20, 8, requires_grad=True) * 1
    layers = [attention.q_proj, attention.k_proj]
    prepare_outputs(x, layers)
    wanted = attention.q_proj(x.detach())
    x += 1
    assert not torch.equal(attention.q_proj(x), wanted)  # x was changed in place since
    with torch.no_grad():
        prepare_outputs(x := x.detach(), layers)
    assert not hasattr(x, "outputs")
    with_shared_input(attention, lambda x, **other: None, "x", x, key_value_states=x)
    assert not hasattr(x, "outputs")
