"""Tests of what configurations of peft may ask of a packed model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

from qlora_lite import QuantConfig, quantize_base_
from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.integrations import get_peft_model, load_peft_model, lora_config
from qlora_lite.integrations.peft_config import fit_, targeted_stacks

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def pairs(import_script: Callable[[str], Any]) -> Any:
    return import_script("tests/interop/peft_pairs.py")


@pytest.fixture
def packed(pairs: Any) -> Any:
    return pairs.packed_model("nf4")


def settings(**given: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]} | given)


def test_all_linear_leaves_out_what_is_excluded(packed: Any) -> None:
    assert set(lora_config(packed, exclude_modules=["mlp"]).target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model = get_peft_model(packed, settings(modules_to_save=["lm_head"]))
    assert set(lora_config(model.get_base_model(), r=2).target_modules) == LINEAR  # nothing of peft's own modules


def test_packed_embeddings_have_neither_rows_that_are_trained_nor_dora(pairs: Any) -> None:
    packed = pairs.packed_model("nf4", "int8")
    with pytest.raises(
        TargetError, match=r"embed_tokens \(trainable_token_indices\): packed weights cannot be trained"
    ):
        get_peft_model(packed, settings(trainable_token_indices=[1]))
    with pytest.raises(TargetError, match=r"packed embeddings have no DoRA: model\.embed_tokens"):
        get_peft_model(packed, settings(use_dora=True, target_modules=["embed_tokens"]))


def test_other_adapters_than_lora_are_refused(packed: Any, tmp_path: Path) -> None:
    for config in (peft.IA3Config(task_type="CAUSAL_LM"), peft.AdaLoraConfig(total_step=10)):
        with pytest.raises(ConfigError, match=f"adapters of peft.LoraConfig; got {type(config).__name__}"):
            get_peft_model(packed, config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="got AdaLoraConfig"):
        load_peft_model(packed, tmp_path)
    with pytest.raises(ConfigError, match="mixed=True"):
        get_peft_model(packed, settings(), mixed=True)


def test_layers_whose_weight_is_read_are_refused(small_model: Callable[..., Any]) -> None:
    model = small_model("MambaConfig", num_hidden_layers=1)
    quantize_base_(model, QuantConfig())
    with pytest.raises(TargetError, match=r"dt_proj: MambaMixer\.forward reads its weight"):
        get_peft_model(model, settings(target_modules=["dt_proj"]))


def test_layers_that_peft_loses_are_refused(small_model: Callable[..., Any]) -> None:
    model = small_model("DeepseekV3Config", num_hidden_layers=1)  # whose first blocks have a dense MLP
    quantize_base_(model, QuantConfig())
    with pytest.raises(
        TargetError, match=r"peft would not load the adapters of 3 layers \(model\.layers\.0\.mlp\.gate"
    ):
        fit_(settings(target_modules="all-linear"), model)
    assert "q_b_proj" in fit_(settings(target_modules="all-linear", exclude_modules=["mlp"]), model).target_modules


def test_stacks_are_named_as_parameters(pairs: Any) -> None:
    model = pairs.packed_model("nf4", family="mixtral")
    stacks = [f"model.layers.{number}.mlp.experts.down_proj" for number in range(2)]
    assert targeted_stacks(settings(target_parameters=["experts.down_proj"]), model) == stacks
    assert len(targeted_stacks(settings(target_modules=["w1", "w2", "w3"]), model)) == 4  # names of transformers 4
    with pytest.raises(TargetError, match=r"\['down_proj'\] match stacks of experts alone, .* in target_parameters"):
        fit_(settings(), model)
    for targets in ({"target_parameters": ["down_proj"]}, {"target_modules": ["q_proj", "w1", "w2", "w3"]}):
        with pytest.raises(TargetError, match=r"packed stacks of experts, which peft passes over: .*get_peft_model"):
            lora_config(model, **targets)
    with pytest.raises(ConfigError, match=r"do not have lora_dropout=0\.1, as in peft"):
        get_peft_model(model, settings(target_modules=["q_proj"], target_parameters=["down_proj"], lora_dropout=0.1))
