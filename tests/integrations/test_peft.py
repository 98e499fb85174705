"""Tests of peft's API on packed models against peft on the same weights unpacked, in fp32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from qlora_lite import QuantConfig, load_adapter_, load_quantized, quantize_base_
from qlora_lite.compute.lora_linear import dequantized
from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.integrations.peft import PackedLinear, load_peft_model, lora_config
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.surgery import replace_modules_
from qlora_lite.training.forward.fuse import fuse_

TOKENS = torch.arange(16, 40).view(2, 12)
SETTINGS: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}


def unpacked(model: Any) -> Any:
    """A copy of a packed model with plain layers that hold the unpacked weights."""

    def plain(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, QuantizedLinear):
            return None
        made = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        made.weight = nn.Parameter(dequantized(module.weight, torch.float32), requires_grad=False)
        made.bias = module.bias
        return made

    other = copy.deepcopy(model)
    replace_modules_(other, plain)
    return other


@pytest.fixture
def packed(small_model: Callable[..., Any]) -> Any:
    model = small_model("Qwen2Config")  # some of its layers have a bias
    quantize_base_(model, QuantConfig())
    return model


def filled_(model: Any) -> Any:
    """Gives all trained parameters values that are not 0, the same in each call and by name."""
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad and "magnitude" not in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def pair(packed: Any, **settings: Any) -> tuple[Any, Any]:
    """The packed model with adapters, and peft's on the unpacked one, with equal values."""
    theirs = get_peft_model(unpacked(packed), peft.LoraConfig(task_type="CAUSAL_LM", **SETTINGS | settings))
    ours = get_peft_model(packed, lora_config(packed, **SETTINGS | settings))
    return filled_(ours), filled_(theirs)


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def assert_same(ours: Any, theirs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["norm"]}],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_outputs_and_gradients_are_those_of_peft(packed: Any, settings: dict[str, Any]) -> None:
    ours, theirs = pair(packed, **settings)
    assert_same(ours, theirs)
    expected, found = gradients(theirs), gradients(ours)
    assert expected.keys() == found.keys() and len(found) >= 8
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_all_linear_finds_packed_layers_and_no_head(packed: Any) -> None:
    model = get_peft_model(packed, lora_config(packed, r=2))
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    fewer = lora_config(model.unload(), r=2, exclude_modules=["mlp"])
    assert set(fewer.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_adapters_are_switched_off_and_exchanged(packed: Any) -> None:
    base = unpacked(packed)
    ours, theirs = pair(packed)
    for model in (ours, theirs):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **SETTINGS)
        model.add_adapter("other", lora_config(packed, **SETTINGS) if model is ours else config)
        model.set_adapter("other")
        filled_(model)
    assert_same(ours, theirs)
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    assert_same(ours, theirs)
    assert gradients(ours).keys() == gradients(theirs).keys()
    with ours.disable_adapter():
        assert_same(ours, base)
    for model in (ours, theirs):
        model.base_model.set_adapter("default")
    names = ["default", "other"]
    with torch.no_grad():
        mixed = [model.eval()(TOKENS, adapter_names=names).logits for model in (ours, theirs)]
    torch.testing.assert_close(*mixed, rtol=1e-4, atol=1e-5)
    for model in (ours, theirs):
        model.delete_adapter("other")
    assert_same(ours, theirs)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_merging_does_not_write_to_the_base(packed: Any, settings: dict[str, Any]) -> None:
    ours, theirs = pair(packed, **settings)
    codes = {name: value.clone() for name, value in ours.named_buffers() if "packed" in name or "absmax" in name}
    before = ours(TOKENS).logits.detach()
    ours.merge_adapter()
    theirs.merge_adapter()
    assert_same(ours, theirs)
    ours.unmerge_adapter()
    assert torch.equal(ours(TOKENS).logits, before)
    assert all(torch.equal(value, ours.get_buffer(name)) for name, value in codes.items())
    whole, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    layers = [module for name, module in whole.named_modules() if name.endswith(("q_proj", "down_proj"))]
    assert all(type(layer) is nn.Linear and layer.weight.dtype == torch.float32 for layer in layers)
    assert any(isinstance(module, QuantizedLinear) for module in whole.modules())  # what was not adapted stays packed
    assert_same(whole, expected)


def test_files_go_between_peft_and_here(packed: Any, tmp_path: Path) -> None:
    ours, theirs = pair(packed)
    expected = ours(TOKENS).logits.detach()
    ours.save_pretrained(tmp_path / "ours")
    assert {file.name for file in (tmp_path / "ours").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    base = ours.unload()
    for load in (load_peft_model, lambda model, folder: (load_adapter_(model, folder), model)[1]):
        again = load(copy.deepcopy(base), tmp_path / "ours")
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    reread = PeftModel.from_pretrained(theirs.unload(), str(tmp_path / "ours"))
    torch.testing.assert_close(reread(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_fused_model_is_trained_through_peft(tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder, dtype=torch.float32)
    fuse_(model)
    adapted = get_peft_model(model, lora_config(model, r=2))
    output = adapted(input_ids=TOKENS, labels=TOKENS)
    output.loss.backward()
    assert output.logits is None and model.fusion.loss == "logit-free"
    trained = [value for value in adapted.parameters() if value.requires_grad]
    assert trained and all(value.grad is not None for value in trained)


def test_a_packed_embedding_is_adapted(tiny_folder: Path) -> None:
    config = QuantConfig(embedding_format="int8")
    model = load_quantized(tiny_folder, config, dtype=torch.float32)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    before = model(TOKENS).logits.detach()
    adapted = get_peft_model(model, lora_config(model, r=2, target_modules=["embed_tokens"]))
    assert torch.equal(adapted(TOKENS).logits, before)
    filled_(adapted)
    assert gradients(adapted) and not torch.allclose(adapted(TOKENS).logits, before)
    with pytest.raises(ConfigError, match="a packed embedding cannot be merged in memory"):
        adapted.merge_and_unload()


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"init_lora_weights": "pissa"}, ConfigError, "do not have init_lora_weights='pissa'; add_lora_ has more"),
        ({"target_parameters": ["a.b"]}, ConfigError, r"do not have target_parameters=\['a.b'\]"),
        ({"modules_to_save": ["o_proj"]}, TargetError, r"layers\.0\.self_attn\.o_proj, .*: packed weights cannot be"),
    ],
)
def test_what_cannot_be_done_is_refused(packed: Any, settings: dict[str, Any], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        lora_config(packed, **settings)
