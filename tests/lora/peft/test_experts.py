"""Tests of adapters on stacks of experts in peft's files, both ways, against peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_adapter_, merge_lora_, quantize_base_, save_adapter
from qlora_lite.errors import CheckpointError
from qlora_lite.lora.adapters import adapter_parameters, lora_layers
from qlora_lite.lora.peft.experts import flatten_A, flatten_B, unflatten_A, unflatten_B
from qlora_lite.quantization.experts import PackedStack

TOKENS = torch.arange(14).view(2, 7)
# Both stacks of other ranks than the rest; one of them; the one below and the one above in different layers.
TARGETS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "gate_up_proj", "experts.down_proj"], "rank_pattern": {"experts.down_proj": 2}},
    {"target_modules": r".*0\.mlp\.experts\..*_proj|.*1\.mlp\.experts\.gate_up_proj", "use_rslora": True},
]


def make(small_model: Callable[..., Any], family: str) -> Any:
    model = small_model(family, shared_expert_intermediate_size=24)
    for name, parameter in model.named_parameters():
        if "experts" in name or "gate" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    ("family", "targets"),
    [("Qwen3MoeConfig", TARGETS[0]), ("Qwen2MoeConfig", TARGETS[0]), ("GptOssConfig", TARGETS[1])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_peft_reads_what_is_written_here_and_the_other_way_round(
    small_model: Callable[..., Any], tmp_path: Path, family: str, targets: dict[str, Any]
) -> None:
    import peft

    ours = make(small_model, family)
    add_lora_(ours, LoraConfig(rank=3, alpha=7, **targets))
    for layer in lora_layers(ours).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(small_model, family), str(tmp_path / "ours")).eval()
    assert relative(ours(TOKENS).logits, theirs(TOKENS).logits) < 1e-5
    assert relative(ours(TOKENS).logits, make(small_model, family)(TOKENS).logits) > 1e-2
    theirs.save_pretrained(tmp_path / "theirs")
    again = make(small_model, family)
    assert set(load_adapter_(again, tmp_path / "theirs")) == lora_layers(ours).keys()
    mine = adapter_parameters(ours)
    assert all(torch.equal(parameter, mine[name]) for name, parameter in adapter_parameters(again).items())
    assert {name: layer.scaling for name, layer in lora_layers(again).items()} == {
        name: layer.scaling for name, layer in lora_layers(ours).items()
    }
    merge_lora_(ours)
    merged = theirs.merge_and_unload()
    for name, layer in lora_layers(ours).items():
        weight = merged.get_parameter(name if "experts" in name else f"{name}.weight")
        assert relative(layer.merged_weight, weight) < 1e-6
    # Values go into adapters that are there already, and onto a packed base.
    assert load_adapter_(ours, tmp_path / "theirs") and relative(ours(TOKENS).logits, again(TOKENS).logits) < 1e-5
    packed = make(small_model, family)
    quantize_base_(packed, QuantConfig(format="int8"))
    load_adapter_(packed, tmp_path / "theirs")
    assert any(isinstance(layer.base_layer, PackedStack) for layer in lora_layers(packed).values())
    assert relative(packed(TOKENS).logits, again(TOKENS).logits) < 0.05


def test_one_that_peft_made_is_read_here(small_model: Callable[..., Any], tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False, use_rslora=True
    )
    theirs = peft.get_peft_model(make(small_model, "MixtralConfig"), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = make(small_model, "MixtralConfig")
    load_adapter_(ours, tmp_path)
    assert relative(ours(TOKENS).logits, theirs(TOKENS).logits) < 1e-5


def test_what_does_not_fit_is_named(small_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make(small_model, "MixtralConfig")
    add_lora_(model, LoraConfig(rank=2, target_modules=["gate_up_proj", "down_proj"]))
    save_adapter(model, tmp_path / "good")
    settings = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    assert settings["target_parameters"] == ["down_proj", "gate_up_proj"] and settings["target_modules"] == []
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    inner = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    assert tensors[inner].shape == (4 * 2, 32)

    def refused(message: str, tensors: dict[str, torch.Tensor], **changed: Any) -> None:
        (tmp_path / "bad").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "bad" / "adapter_model.safetensors")
        (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(settings | changed))
        fresh = make(small_model, "MixtralConfig")
        with pytest.raises(CheckpointError, match=message):
            load_adapter_(fresh, tmp_path / "bad")
        assert not lora_layers(fresh)

    refused("lora_A is .*7, 32.*, the layer needs .*4, 2, 32", tensors | {inner: torch.zeros(7, 32)})
    refused("lora_A is .*4, 3, 32.*, the layer needs .*4, 2, 32", tensors | {inner: torch.zeros(12, 32)})
    less = {key: tensor for key, tensor in tensors.items() if "layers.1.mlp.experts.lora" not in key}
    refused("layers.1.mlp.experts.down_proj is targeted and has no tensors in the file", less)
    refused("experts.base_layer is not a layer of this model", tensors, target_parameters=["down_proj"])
    refused("target_parameters \\['gate.bias'\\] match no stack", tensors, target_parameters=["gate.bias"])
    refused(
        "0.mlp.gate is targeted and has no tensors",
        tensors,
        target_parameters=["gate.weight", "down_proj", "gate_up_proj"],
    )
    refused("dropout must be 0 on a stack of experts; got 0.1", tensors, lora_dropout=0.1)


def test_the_layouts_are_each_others_inverse() -> None:
    lora_A, lora_B = torch.randn(4, 2, 5), torch.randn(4, 6, 2)
    assert torch.equal(unflatten_A(flatten_A(lora_A), 4), lora_A)
    assert torch.equal(unflatten_B(flatten_B(lora_B), 4), lora_B)
    assert torch.equal(flatten_B(lora_B)[:, 1 * 4 + 3], lora_B[3, :, 1])
