"""Tests of lost_layers.py against the installed peft, which loses or refuses these layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

from qlora_lite import LoraConfig, add_lora_, save_adapter
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.peft.lost_layers import RENAMED, lost_in_peft

MAMBA = {"state_size": 4, "time_step_rank": 4}


def test_names_and_types_are_those_of_the_installed_peft() -> None:
    from peft.utils import transformers_weight_conversion as conversion
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    names = {kind: set(mapping) for kind, mapping in conversion._MOE_TARGET_MODULE_MAPPING.items()}
    kinds = {model: kind for model, kind in conversion._MODEL_TO_CONVERSION_PATTERN.items() if kind in names}
    types = {model: names[kind] for model, kind in kinds.items() if model in CONFIG_MAPPING_NAMES}
    assert {model: set(last) for model, last in RENAMED.items()} == types


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_reported_is_what_peft_does_not_load(small_model: Callable[..., Any], tmp_path: Path) -> None:
    model = small_model("Qwen3MoeConfig", mlp_only_layers=[0])
    add_lora_(model, LoraConfig(2, 4))
    (sentence,) = save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_model("Qwen3MoeConfig", mlp_only_layers=[0]), str(tmp_path))
    theirs = {name for name, module in loaded.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    lost = [name for name in lora_layers(model) if f"base_model.model.{name}" not in theirs]
    assert lost and lost_in_peft("qwen3_moe", lora_layers(model)) == [sentence]
    assert sentence.startswith(f"peft would not load the adapters of {len(lost)} layers ({', '.join(lost)}): in models")
    assert sentence.endswith("; leave them out of target_modules, or ship the merged model")


def test_what_is_refused_is_what_peft_refuses(small_model: Callable[..., Any], tmp_path: Path) -> None:
    model = small_model("MambaConfig", **MAMBA)
    add_lora_(model, LoraConfig(2, 4))
    (sentence,) = save_adapter(model, tmp_path)
    assert "refuses adapters on 2 layers" in sentence and "in models of type mamba; leave them out" in sentence
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
        peft.PeftModel.from_pretrained(small_model("MambaConfig", **MAMBA), str(tmp_path))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lagunas_shared_experts_are_renamed_by_peft(small_model: Callable[..., Any], tmp_path: Path) -> None:
    sizes = {"shared_expert_intermediate_size": 8, "moe_intermediate_size": 8, "num_experts": 4}
    model = small_model("LagunaConfig", **sizes)
    add_lora_(model, LoraConfig(2, 4, target_modules=["q_proj", "up_proj"]))
    (sentence,) = save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*shared_experts.up_proj.lora_A") as said:
        peft.PeftModel.from_pretrained(small_model("LagunaConfig", **sizes), str(tmp_path))
    assert "peft would not load the adapters of 1 layers" in sentence and "q_proj" not in str(said[0].message)


def test_late_layers_of_an_rwkv_are_misread(small_model: Callable[..., Any], tmp_path: Path) -> None:
    names = [f"rwkv.blocks.{block}.{end}" for block in (5, 6) for end in ("attention.output", "attention.key")]
    (sentence,) = lost_in_peft("rwkv", names)
    assert "1 layers (rwkv.blocks.6.attention.output): transformers divides the weights" in sentence
    assert lost_in_peft("rwkv", names[:2]) == []


def test_other_models_and_other_layers_are_not_reported(small_model: Callable[..., Any], tmp_path: Path) -> None:
    model = small_model("LlamaConfig")
    add_lora_(model, LoraConfig(2, 4))
    assert save_adapter(model, tmp_path) == []
    assert lost_in_peft("qwen3_moe", ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.shared_expert_gate"]) == []
