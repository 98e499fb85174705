"""Tests of merging in peft's layers around packed weights: several adapters, one after another, and none left."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from qlora_lite import QuantConfig
from qlora_lite.integrations.peft_embedding import PackedEmbedding
from qlora_lite.integrations.peft_linear import PackedLinear
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight


@pytest.fixture(params=[PackedLinear, PackedEmbedding])
def case(request: pytest.FixtureRequest) -> tuple[Any, Tensor]:
    """A packed layer with the adapters `default` and `second`, which have an effect, and its input."""
    made: Any
    if request.param is PackedLinear:
        base: nn.Module = QuantizedLinear(PackedWeight.of(torch.randn(6, 64), QuantConfig()))
    else:
        base = QuantizedEmbedding(PackedWeight.of(torch.randn(12, 8), QuantConfig(), "int8"), torch.float32)
    made = request.param(base, "default", config=peft.LoraConfig(), r=2, lora_alpha=3)
    made.update_layer("second", 2, 3, config=peft.LoraConfig())
    for name, values in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(values)
    return made.eval(), torch.randn(3, 64) if request.param is PackedLinear else torch.arange(12)


def test_adapters_are_merged_one_after_another_and_dropped_at_once(case: tuple[Any, Tensor]) -> None:
    layer, x = case
    base = {name: value.clone() for name, value in layer.base_layer.state_dict().items()}
    expected = []
    for adapters in (["default"], ["default", "second"]):
        layer.set_adapter(adapters)
        expected.append(layer(x).detach())
    layer.merge(adapter_names=["default"])
    torch.testing.assert_close(layer(x), expected[0])
    layer.merge(adapter_names=["second", "default"])  # peft passes over what is merged
    assert layer.merged_adapters == ["default", "second"]
    torch.testing.assert_close(layer(x), expected[1])
    whole = layer.train().unload_and_optionally_merge_module(merge=False)
    assert whole.training and type(whole) in (nn.Linear, nn.Embedding)
    torch.testing.assert_close(whole(x), expected[1])
    layer.unmerge()
    assert layer.merged_weight is None and not layer.merged_adapters
    assert layer.unload_and_optionally_merge_module(merge=False) is layer.base_layer
    assert all(torch.equal(value, base[name]) for name, value in layer.base_layer.state_dict().items())
