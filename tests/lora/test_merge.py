"""Merging a whole model, and taking it back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, merge_lora_, quantize_base_, unmerge_lora_
from qlora_lite.errors import QuantizationError, TargetError
from qlora_lite.lora.adapters import lora_layers


def adapted(format: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    quantize_base_(model, QuantConfig(format=format))
    add_lora_(model, LoraConfig(rank=4))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


@pytest.mark.parametrize("format", ["none", "nf4", "fp4", "int8"])
def test_merged_equals_unmerged(format: str) -> None:
    model, x = adapted(format), torch.randn(8, 64)
    before = model(x)
    merge_lora_(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    unmerge_lora_(model)
    assert torch.equal(model(x), before)


def test_overflow_names_the_layer_and_merges_none() -> None:
    model = adapted("nf4")
    with torch.no_grad():
        model[2].lora_B.fill_(1e7)
    with pytest.raises(QuantizationError, match=r"2\.weight reaches .* use bfloat16"):
        merge_lora_(model, torch.float16)
    assert not any(layer.merged for layer in lora_layers(model).values())


def test_without_adapters_there_is_nothing_to_merge() -> None:
    with pytest.raises(TargetError, match="no adapters"):
        merge_lora_(nn.Sequential(nn.Linear(2, 2)))
