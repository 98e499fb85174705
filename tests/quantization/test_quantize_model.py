"""Packing a model in place, and taking over what bitsandbytes has packed."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized, merge_lora_, quantize_base_
from qlora_lite.errors import ConfigError, QuantizationError, TargetError
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight


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
    with pytest.raises(TargetError, match="shares its weight with the input embedding"):
        load_quantized(tiny_folder, QuantConfig(skip_modules=()))


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


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_linear_with_a_forward_of_its_own_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64), Doubled(64, 64))
    with pytest.raises(TargetError, match="1 is a Doubled with a forward of its own"):
        quantize_base_(model, QuantConfig())
    quantize_base_(model, QuantConfig(skip_modules=("1",)))
    assert isinstance(model[0], QuantizedLinear) and isinstance(model[1], Doubled)


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


def test_a_layer_that_cannot_be_taken_over_leaves_the_model_as_it_was() -> None:
    import bitsandbytes

    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64).to("cpu"), bitsandbytes.nn.Linear4bit(64, 64))
    with pytest.raises(QuantizationError, match="1 is a Linear4bit without packed data"):
        quantize_base_(model, QuantConfig())
    assert all(type(layer) is bitsandbytes.nn.Linear4bit for layer in model)
