"""Tests of taking over models that bitsandbytes packed, re-packed codes included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized, quantize_base_
from qlora_lite.errors import QuantizationError
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.quantization.packed_weight import PackedWeight


def bitsandbytes_model(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)


@pytest.mark.parametrize("double_quant", [True, False])
def test_takes_over_4_bit_layers_and_shares_their_bytes(tiny_folder: Path, double_quant: bool) -> None:
    model = bitsandbytes_model(
        tiny_folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
    )
    theirs = model.model.layers[0].mlp.down_proj
    address, values = theirs.weight.data_ptr(), bnb.dequantize_4bit(theirs.weight, theirs.weight.quant_state)
    assert len(quantize_base_(model, QuantConfig())) == 14
    ours = model.model.layers[0].mlp.down_proj
    assert ours.weight.packed.data_ptr() == address and ours.weight.double_quant == double_quant
    assert torch.equal(ours.weight.dequantize(torch.float32), values.float())
    assert getattr(model.config, "quantization_config", None) is None
    ours_loaded = load_quantized(tiny_folder, QuantConfig(double_quant=double_quant), dtype=torch.float32)
    assert torch.equal(ours_loaded.model.layers[0].mlp.down_proj.weight.packed, ours.weight.packed)
    model.to(torch.bfloat16)


def test_puts_codes_back_that_bitsandbytes_repacks__repacked_by_its_own_function(tiny_folder: Path) -> None:
    model = bitsandbytes_model(tiny_folder, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    layer = model.model.layers[0].mlp.down_proj
    codes, absmax = layer.weight.data.clone().view(-1), layer.weight.quant_state.absmax.clone()
    layer.weight.data, layer.weight.quant_state = bnb._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    quantize_base_(model, QuantConfig())
    ours = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(ours.packed, codes)
    assert torch.equal(ours.absmax, absmax.bfloat16().float())


def test_takes_over_8_bit_layers(tiny_folder: Path) -> None:
    model = bitsandbytes_model(tiny_folder, load_in_8bit=True)
    theirs = model.model.layers[0].mlp.down_proj
    codes, absmax = theirs.weight.CB.clone(), theirs.weight.SCB.clone()
    quantize_base_(model, QuantConfig(format="int8"))
    ours = model.model.layers[0].mlp.down_proj.weight
    assert isinstance(ours, PackedWeight) and torch.equal(ours.packed, codes) and torch.equal(ours.absmax, absmax)


def test_an_eval_forward_changes_neither_bytes_nor_gradients(tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig(), dtype=torch.float32)
    add_lora_(model, LoraConfig(rank=2))
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(100, (2, 9))

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return [parameter.grad.clone() for parameter in adapter_parameters(model).values()]

    stored = {name: value.clone() for name, value in model.state_dict().items()}
    before = gradients()
    with torch.no_grad():
        model.eval()(tokens)
    after = gradients()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def test_a_layer_that_cannot_be_taken_over_leaves_the_model_as_it_was() -> None:
    import bitsandbytes

    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64).to("cpu"), bitsandbytes.nn.Linear4bit(64, 64))
    with pytest.raises(QuantizationError, match="1 is a Linear4bit without packed data"):
        quantize_base_(model, QuantConfig())
    assert all(type(layer) is bitsandbytes.nn.Linear4bit for layer in model)
