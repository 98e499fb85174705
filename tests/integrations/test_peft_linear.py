"""Tests of peft's layer around a packed linear layer, by itself."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from qlora_lite import QuantConfig
from qlora_lite.errors import ConfigError, InputError, QuantizationError
from qlora_lite.integrations.peft_linear import PackedLinear, unpacked_layer
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight


def layer_of(bias: bool = True, transposed: bool = False, **settings: Any) -> PackedLinear:
    """A layer with an adapter whose B is not 0."""
    weight = PackedWeight.of(torch.randn(24, 16), QuantConfig())
    offset = nn.Parameter(torch.randn(24), requires_grad=False) if bias else None
    base = QuantizedLinear(weight, offset, transposed=transposed)
    layer = PackedLinear(base, "default", config=peft.LoraConfig(**settings), r=4, lora_alpha=6)
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def merged_by_hand(layer: PackedLinear) -> Tensor:
    base = layer.get_base_layer().weight.dequantize(torch.float32)
    return base + 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


def test_the_output_is_that_of_the_docstring() -> None:
    layer, x = layer_of(), torch.randn(3, 5, 16)
    torch.testing.assert_close(layer(x), x @ merged_by_hand(layer).T + layer.bias)
    dora = layer_of(use_dora=True)
    dora.lora_magnitude_vector["default"].weight.data *= 1.5
    norms = merged_by_hand(dora).norm(dim=1)
    torch.testing.assert_close(dora.output_norms("default"), norms)
    gain = dora.lora_magnitude_vector["default"].weight / norms
    torch.testing.assert_close(dora(x), (x @ merged_by_hand(dora).T) * gain + dora.bias)


def test_dora_starts_without_an_effect() -> None:
    weight = PackedWeight.of(torch.randn(24, 16), QuantConfig())
    layer = PackedLinear(QuantizedLinear(weight), "default", config=peft.LoraConfig(use_dora=True), r=4, lora_alpha=6)
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), layer.get_base_layer()(x))


def test_a_merge_stands_beside_the_base() -> None:
    layer, x = layer_of(lora_bias=True), torch.randn(3, 16)
    nn.init.normal_(layer.lora_B["default"].bias)
    codes, bias, before = layer.get_base_layer().weight.packed.clone(), layer.bias.clone(), layer(x)
    layer.merge()
    assert layer.merged and torch.equal(layer.get_base_layer().weight.packed, codes)
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(layer.merged_weight, merged_by_hand(layer))
    layer.unmerge()
    assert not layer.merged and torch.equal(layer(x), before) and torch.equal(layer.bias, bias)
    assert not [name for name in layer.state_dict() if "merged" in name]


def test_what_cannot_be_merged_changes_nothing() -> None:
    for broken in (layer_of(bias=False, lora_bias=True), layer_of()):
        if broken.bias is not None:
            broken.lora_B["default"].weight.data[0, 0] = float("nan")
        with pytest.raises((ConfigError, QuantizationError), match=r"lora_bias|NaN"):
            broken.merge()
        assert broken.merged_weight is None and not broken.merged


@pytest.mark.parametrize("transposed", [False, True])
def test_the_unpacked_layer_is_the_one_that_was_packed(transposed: bool) -> None:
    layer, x = layer_of(transposed=transposed), torch.randn(3, 16)
    whole = layer.unload_and_optionally_merge_module(merge=True)
    assert type(whole).__name__ == ("Conv1D" if transposed else "Linear")
    assert whole.weight.shape == ((16, 24) if transposed else (24, 16)) and not whole.weight.requires_grad
    torch.testing.assert_close(whole(x), x @ merged_by_hand(layer).T + layer.bias)
    base = layer_of(bias=False).get_base_layer()
    assert unpacked_layer(base, torch.zeros(24, 16), None).bias is None


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(InputError, match="16 features"):
        layer_of()(torch.randn(3, 17))
