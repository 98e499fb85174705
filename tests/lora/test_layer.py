"""Tests of the LoRA layers against the equation and torch.nn.Embedding."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite import Embedding, LinearWithLoRA, LoraLayer
from qlora_lite.errors import ConfigError, InputError, TargetError
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.quantize_model import quantize_base_

TOKENS = torch.tensor([[1, 2, 3, 2], [2, 0, 9, 1]])


def warm(layer: LoraLayer) -> LoraLayer:
    """A layer whose adapter does something."""
    torch.manual_seed(3)
    nn.init.normal_(layer.lora_B)
    return layer


def test_the_documents_usage_trains() -> None:
    torch.manual_seed(0)
    embedding = Embedding(vocab_size=50000, embed_dim=768, rank=16, alpha=32, merge_weights=True)
    linear = LinearWithLoRA(fan_in=768, fan_out=768, rank=16, alpha=32, bias=True)
    frozen = [embedding.base_layer.weight.clone(), linear.base_layer.weight.clone(), linear.bias.clone()]
    batch = {"input_ids": torch.randint(50000, (4, 16)), "labels": torch.randint(768, (4,))}
    optimizer = torch.optim.AdamW([{"params": embedding.parameters()}, {"params": linear.parameters()}], lr=1e-2)
    losses = []
    for _epoch in range(12):
        optimizer.zero_grad()
        embeds = embedding(batch["input_ids"])
        output = linear(embeds)
        loss = nn.functional.cross_entropy(output.mean(1), batch["labels"])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    now = [embedding.base_layer.weight, linear.base_layer.weight, linear.bias]
    assert all(torch.equal(was, one) for was, one in zip(frozen, now, strict=True))
    assert embedding.lora_B.abs().sum() > 0 and linear.lora_B.abs().sum() > 0


def test_shapes_and_starting_values() -> None:
    torch.manual_seed(0)
    layer = Embedding(1000, 64, rank=8, alpha=4)
    assert layer.lora_A.shape == (8, 1000) and layer.lora_B.shape == (64, 8) and layer.scaling == 0.5
    assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(1000), rel=0.05)
    assert layer.lora_A.std().item() == pytest.approx(0.02, rel=0.05) and not layer.lora_B.any()


@pytest.mark.parametrize("rank", [1, 9])
def test_rslora_scales_by_the_root_of_the_rank_everywhere(rank: int) -> None:
    layer = warm(LoraLayer(rank, 6, nn.Linear(5, 4), dropout=0.0, use_rslora=True))
    update = 6 / math.sqrt(rank) * layer.lora_B @ layer.lora_A
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ update.T)
    torch.testing.assert_close(layer.delta_weight(), update)
    torch.testing.assert_close(layer.effective_weight(torch.float32), layer.base_layer.weight + update)
    tokens = warm(LoraLayer(rank, 6, nn.Embedding(10, 4), dropout=0.0, use_rslora=True))
    update = 6 / math.sqrt(rank) * tokens.lora_B @ tokens.lora_A
    torch.testing.assert_close(tokens(TOKENS), tokens.base_layer(TOKENS) + update.T[TOKENS])
    torch.testing.assert_close(tokens.delta_weight(), update.T)


@pytest.mark.parametrize("format", ["none", "nf4", "int8"])
def test_merged_equals_unmerged_and_comes_apart_again(format: str) -> None:
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(64, 32))
    quantize_base_(holder, QuantConfig(format=format))
    layer = warm(LoraLayer(4, 8, holder[0])).eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(5, 64)
    apart = layer(x)
    layer.merge_weights()
    layer.merge_weights()
    assert layer.merged
    assert (layer(x) - apart).abs().max() <= 1e-5 * apart.abs().max()
    layer.unmerge_weights()
    layer.unmerge_weights()
    assert not layer.merged and torch.equal(layer(x), apart)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_merging_has_to_be_permitted() -> None:
    layer = LinearWithLoRA(4, 4, 2, merge_weights=False)
    for method in (layer.merge_weights, layer.unmerge_weights):
        with pytest.raises(ConfigError, match="merge_weights=False"):
            method()


def test_weight_is_w0_plus_scaled_product() -> None:
    layer = warm(LinearWithLoRA(6, 5, rank=2, alpha=3))
    expected = layer.base_layer.weight + 1.5 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.effective_weight(torch.float32), expected.detach())


def test_reading_changes_nothing_that_is_stored() -> None:
    for layer, x in (
        (LoraLayer(2, 2, nn.Linear(4, 4)), torch.randn(3, 4)),
        (Embedding(10, 4, 2, max_norm=0.1), TOKENS),
    ):
        before = copy.deepcopy(layer.state_dict())
        layer.eval()(x)
        layer.train()(x)
        layer.state_dict()
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_loading_while_merged_merges_the_new_values() -> None:
    layer, other = warm(LinearWithLoRA(4, 4, 2)), LinearWithLoRA(4, 4, 2)
    layer.merge_weights()
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 4)
    assert layer.merged
    torch.testing.assert_close(layer(x), other(x))
    torch.testing.assert_close(copy.deepcopy(layer)(x), other(x))


def test_dropout_acts_in_training_only() -> None:
    layer = warm(LoraLayer(2, 2, nn.Linear(64, 8), dropout=0.5))
    x = torch.randn(4, 64)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LinearWithLoRA(4, 4, rank=0), ConfigError, "rank must be an integer of at least 1; got 0"),
        (lambda: LinearWithLoRA(4, 4, 2, alpha=math.inf), ConfigError, "alpha must be a finite number"),
        (lambda: LoraLayer(2, 2, nn.Linear(4, 4), dropout=1.0), ConfigError, r"dropout must be in \[0, 1\)"),
        (
            lambda: LoraLayer(2, 2, nn.Linear(4, 4), use_rslora=1),
            ConfigError,
            "use_rslora must be True or False; got 1",
        ),
        (lambda: LoraLayer(2, 2, nn.EmbeddingBag(4, 4)), TargetError, "EmbeddingBag cannot be adapted"),
        (lambda: LoraLayer(2, 2, nn.Linear(4, 4), adapter_dtype="fp16"), ConfigError, "float dtype; got 'fp16'"),
        (lambda: Embedding(0, 4, 2), ConfigError, "vocab_size must be an integer of at least 1; got 0"),
        (lambda: Embedding(10, 4, 2, padding_idx=10), ConfigError, "padding_idx must be None or a token of the 10"),
        (lambda: Embedding(10, 4, 2)([1, 2]), InputError, "int64 or int32; got a list"),
        (lambda: LinearWithLoRA(4, 4, 2)(None), InputError, "takes floats with 4 features"),
        (lambda: LoraLayer(2, 2, nn.LayerNorm(4)), TargetError, "LayerNorm cannot be adapted"),
        (lambda: LoraLayer(2, 2, LinearWithLoRA(4, 4, 2)), TargetError, "cannot be adapted"),
        (lambda: Embedding(10, 4, 2)(torch.tensor([3, 10, -1])), InputError, r"in \[0, 10\); got 10, and 1 more"),
        (lambda: Embedding(10, 4, 2)(torch.tensor([0.5])), InputError, "int64 or int32; got torch.float32"),
        (lambda: LinearWithLoRA(4, 4, 2)(torch.tensor([[1, 2, 3, 4]])), InputError, "takes floats with 4 features"),
        (lambda: LinearWithLoRA(4, 4, 2)(torch.randn(2, 5)), InputError, "takes floats with 4 features"),
    ],
)
def test_mistakes_get_one_sentence(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    class Scaled(nn.Embedding):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(tokens)

    with pytest.raises(TargetError, match="without a forward of their own"):
        LoraLayer(2, 4, Scaled(8, 4))


def test_resetting_a_merged_layer_resets_what_it_computes() -> None:
    layer = LinearWithLoRA(8, 4, 2)
    nn.init.normal_(layer.lora_B)
    layer.merge_weights()
    layer.reset_parameters()
    x = torch.randn(3, 8)
    assert layer.merged and torch.equal(layer(x), layer.base_layer(x))


def test_under_autocast_it_computes_as_torchs_own_linear() -> None:
    layer, x = LinearWithLoRA(8, 4, 2), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(x), layer.base_layer(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    assert layer.lora_B.grad is not None and layer.lora_B.grad.dtype == torch.float32
