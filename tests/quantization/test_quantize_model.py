"""Tests of packing a model in place."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized, merge_lora_, quantize_base_
from qlora_lite.errors import ConfigError, QuantizationError, TargetError
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear


def test_full_precision_weights_are_let_go() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    old = [weakref.ref(layer.weight) for layer in model]
    assert quantize_base_(model, QuantConfig()) == ["0", "1"]
    assert all(ref() is None for ref in old)


def test_skipping_and_refusing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(TargetError, match=r"skip_modules \['7'\] matched no layer"):
        quantize_base_(model, QuantConfig(skip_modules=("7",)))
    assert quantize_base_(model, QuantConfig(skip_modules=("1",))) == ["0"]
    with pytest.raises(TargetError, match="no layer to pack"):
        quantize_base_(nn.Sequential(nn.ReLU()), QuantConfig())
    with pytest.raises(ConfigError, match="get_input_embeddings"):
        quantize_base_(nn.Sequential(nn.Linear(2, 2)), QuantConfig(embedding_format="int8"))


def test_nan_anywhere_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[2, 3] = float("nan")
    with pytest.raises(QuantizationError, match=r"1\.weight holds nan at index \(2, 3\)"):
        quantize_base_(model, QuantConfig())
    assert all(type(layer) is nn.Linear for layer in model)


def test_tie_is_kept_and_never_broken_in_silence(tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig(embedding_format="int8"))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    assert embedding.weight is head.weight
    with pytest.raises(TargetError, match=r"shares its weight with the input embedding .*\(embedding_format='int8'\)$"):
        load_quantized(tiny_folder, QuantConfig(skip_modules=()))


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_linear_with_a_forward_of_its_own_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(64, 64), Doubled(64, 64))
    assert quantize_base_(model, QuantConfig()) == ["0"]
    assert isinstance(model[0], QuantizedLinear) and isinstance(model[1], Doubled)
    with pytest.raises(TargetError, match=r"no layer to pack: .* but 0 \(a Doubled has a forward of its own\)$"):
        quantize_base_(nn.Sequential(Doubled(64, 64)), QuantConfig())


@pytest.mark.parametrize("bad", [float("nan"), 1e6])
def test_a_bad_embedding_leaves_the_model_as_it_was(tiny_folder: Path, bad: float) -> None:
    model = load_quantized(tiny_folder, QuantConfig(format="none"))
    with torch.no_grad():
        model.model.embed_tokens.weight[2, 1] = bad
    with pytest.raises(QuantizationError, match=r"model\.embed_tokens\.weight"):
        quantize_base_(model, QuantConfig(embedding_format="int8"))
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_a_merged_model_is_not_packed_under_its_merged_weights(tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig(format="none"))
    add_lora_(model, LoraConfig(rank=2))
    merge_lora_(model)
    with pytest.raises(ConfigError, match="unmerge_lora_ first"):
        quantize_base_(model, QuantConfig())


def test_layers_that_share_a_weight_share_the_packed_one() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    x = torch.randn(2, 64)
    quantize_base_(model, QuantConfig())
    assert model[0].weight is model[1].weight is not model[2].weight
    torch.testing.assert_close(model[0](x) - model[0].bias, model[1](x))
