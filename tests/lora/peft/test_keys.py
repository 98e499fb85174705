"""Tests of adapters as older releases of peft and other programs wrote them, against peft."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_lite import load_adapter_
from qlora_lite.errors import CheckpointError
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.peft.keys import current_key, layer_and_part

TOKENS = torch.arange(12).view(2, 6)
# What peft 0.2 wrote, in whole.
FIRST_CONFIG = {
    "base_model_name_or_path": "someone/llama",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 3,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


def saved(model: Any, folder: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of an adapter of peft on this model, with values that do something."""
    import peft

    theirs = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 7, **options}))
    for name, parameter in theirs.named_parameters():
        if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


def rewrite(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def logits_of_both(make: Callable[[], Any], folder: Path) -> tuple[Tensor, Tensor]:
    """(ours, peft's) with the adapter in this folder; ours on every layer that peft adapts."""
    import peft

    theirs = peft.PeftModel.from_pretrained(make(), folder).eval()
    ours = make()
    assert set(load_adapter_(ours, folder)) == set(theirs.base_model.targeted_module_names)
    assert (make()(TOKENS).logits - theirs(TOKENS).logits).abs().max() > 1e-3
    return ours.eval()(TOKENS).logits, theirs(TOKENS).logits


def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in a state_dict: the adapter's name in each key."""
    return {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (dict, FIRST_CONFIG),
        (named, FIRST_CONFIG),
        (dict, {**FIRST_CONFIG, "target_modules": None}),
        (dict, {**FIRST_CONFIG, "fan_in_fan_out": None, "lora_dropout": 0}),
        (dict, {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "r": 3}),
    ],
)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_configurations_of_older_releases(
    small_model: Callable[..., Any], tmp_path: Path, change: Callable[[Any], Any], config: dict[str, Any]
) -> None:
    tensors, _ = saved(small_model("LlamaConfig"), tmp_path, target_modules=["q_proj", "v_proj"])
    rewrite(tmp_path, change(tensors), config)
    ours, theirs = logits_of_both(lambda: small_model("LlamaConfig"), tmp_path)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rank_and_alpha_that_are_missing_are_eight_as_in_peft(small_model: Callable[..., Any], tmp_path: Path) -> None:
    tensors, _ = saved(small_model("LlamaConfig"), tmp_path, r=8, lora_alpha=99, target_modules=["q_proj"])
    rewrite(tmp_path, tensors, {"peft_type": "LORA", "target_modules": ["q_proj"]})
    ours, theirs = logits_of_both(lambda: small_model("LlamaConfig"), tmp_path)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    rewrite(tmp_path, tensors, {"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": None})
    with pytest.raises(CheckpointError, match="alpha must be a finite number; got None"):
        load_adapter_(small_model("LlamaConfig"), tmp_path)


def test_magnitudes_as_a_parameter_and_as_a_module(small_model: Callable[..., Any], tmp_path: Path) -> None:
    tensors, config = saved(small_model("LlamaConfig"), tmp_path, target_modules=["q_proj"], use_dora=True)
    assert any(key.endswith("lora_magnitude_vector") for key in tensors)
    for ending in ("lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"):
        rewrite(tmp_path, {key.replace("lora_magnitude_vector", ending): t for key, t in tensors.items()}, config)
        ours, theirs = logits_of_both(lambda: small_model("LlamaConfig"), tmp_path)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_keys_without_prefix_are_what_they_are_with_it(small_model: Callable[..., Any], tmp_path: Path) -> None:
    tensors, config = saved(small_model("GPT2Config"), tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    config["fan_in_fan_out"] = None
    rewrite(tmp_path, tensors, config)
    _, theirs = logits_of_both(lambda: small_model("GPT2Config"), tmp_path)
    rewrite(tmp_path, {key.removeprefix("base_model.model."): t for key, t in tensors.items()}, config)
    ours = small_model("GPT2Config")
    load_adapter_(ours, tmp_path)
    torch.testing.assert_close(ours.eval()(TOKENS).logits, theirs, rtol=1e-5, atol=1e-5)


def test_an_embedding_beside_its_base_weight_as_peft_06_had_it(small_model: Callable[..., Any], tmp_path: Path) -> None:
    tensors, config = saved(small_model("LlamaConfig"), tmp_path, target_modules=["embed_tokens"])
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors["base_model.model.model.embed_tokens.weight"] = tensors.pop(copy)
    rewrite(tmp_path, tensors, config)
    ours, theirs = logits_of_both(lambda: small_model("LlamaConfig"), tmp_path)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(64, 32)
    rewrite(tmp_path, tensors, config)
    with pytest.raises(CheckpointError, match="comes with a base weight that differs"):
        load_adapter_(small_model("LlamaConfig"), tmp_path)


def test_an_older_file_is_exported_like_a_new_one(small_model: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from qlora_lite.export.merged import merge_checkpoint
    from qlora_lite.quantization.config import QuantConfig

    make = functools.partial(small_model, "LlamaConfig")
    make().save_pretrained(tmp_path / "base")
    tensors, _ = saved(make(), tmp_path / "a", target_modules=["q_proj", "v_proj"])
    rewrite(tmp_path / "a", named(tensors), FIRST_CONFIG)
    quant = QuantConfig(format="none")
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out", quant, torch.float32, base="original")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours, _ = logits_of_both(make, tmp_path / "a")
    torch.testing.assert_close(merged(TOKENS).logits, ours, rtol=1e-4, atol=1e-5)


def test_a_key_that_is_there_twice_is_refused(small_model: Callable[..., Any], tmp_path: Path) -> None:
    tensors, config = saved(small_model("LlamaConfig"), tmp_path, target_modules=["q_proj"])
    rewrite(tmp_path, {**named(tensors), **{key: t.clone() for key, t in tensors.items()}}, config)
    with pytest.raises(CheckpointError, match=r"q_proj.lora_A.weight twice, as \S+ and as base_model"):
        load_adapter_(small_model("LlamaConfig"), tmp_path)


def test_a_pickle_is_not_opened(small_model: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(FIRST_CONFIG))
    (tmp_path / "adapter_model.bin").mkdir()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors does not exist"):
        load_adapter_(small_model("LlamaConfig"), tmp_path)
    (tmp_path / "adapter_model.bin").rmdir()
    (tmp_path / "adapter_model.bin").write_bytes(b"cposix\nsystem\n")
    model = small_model("LlamaConfig")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin is a pickle, .*\.save_pretrained\(folder\)$"):
        load_adapter_(model, tmp_path)
    assert not lora_layers(model)


@pytest.mark.parametrize(
    "option", [{"enable_lora": [True, False, True]}, {"layer_replication": [[0, 2]]}, {"kasa_config": {"beta": 0.1}}]
)
def test_options_that_are_not_honoured_are_named(
    small_model: Callable[..., Any], tmp_path: Path, option: dict[str, Any]
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**FIRST_CONFIG, **option}))
    with pytest.raises(CheckpointError, match=f"sets {next(iter(option))}, which this version does not support"):
        load_adapter_(small_model("LlamaConfig"), tmp_path)


def test_keys_are_todays() -> None:
    today = "base_model.model.default.lora_A.weight"
    assert current_key("base_model.model.default.lora_A.default.weight") == current_key(today) == today
    assert layer_and_part(today) == ("default", "lora_A") and layer_and_part("base_model.model.x.weight") is None
