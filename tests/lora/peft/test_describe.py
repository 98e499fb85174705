"""Tests of the description of an adapter on disk against the model that was saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite import LoraConfig, add_lora_, save_adapter
from qlora_lite.errors import CheckpointError
from qlora_lite.lora.adapters import adapter_parameters, lora_layers
from qlora_lite.lora.peft.describe import describe_adapter


def test_facts_are_those_of_the_model_that_was_saved(small_model: Callable[..., Any], tmp_path: Path) -> None:
    model = small_model("LlamaConfig")
    targets = ["q_proj", "down_proj", "embed_tokens"]
    ranks, alphas = {"layers.1.*q_proj": 6}, {"down_proj": 5}
    config = LoraConfig(2, 7, target_modules=targets, use_rslora=True, rank_pattern=ranks, alpha_pattern=alphas)
    add_lora_(model, LoraConfig(**{**vars(config), "adapter_dtype": torch.bfloat16}))
    save_adapter(model, tmp_path)
    facts = describe_adapter(tmp_path)
    layers = lora_layers(model)
    assert {layer.name: (layer.rank, layer.alpha, layer.scaling) for layer in facts.layers} == {
        name: (layer.rank, layer.alpha, layer.scaling) for name, layer in layers.items()
    }
    parameters = adapter_parameters(model).values()
    assert facts.parameters == sum(p.numel() for p in parameters) and facts.bytes == 2 * facts.parameters
    assert (facts.dtypes, facts.use_rslora, facts.variant, facts.base) == (("bfloat16",), True, "lora", None)
    said = facts.to_json()
    assert json.loads(json.dumps(said)) == said and said["layers"] == 5
    embedding, down, query = said["by_name"]
    assert (embedding["kind"], embedding["layers"], embedding["parameters"]) == ("embedding", 1, 2 * (64 + 32))
    assert (down["name"], down["alphas"], down["layers"]) == ("down_proj", [5], 2)
    assert query["ranks"] == [2, 6] and query["scalings"] == [7 / math.sqrt(6), 7 / math.sqrt(2)]


def test_what_comes_beside_the_adapter_is_counted_apart(small_model: Callable[..., Any], tmp_path: Path) -> None:
    import peft

    options = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "bias": "all"}
    model = peft.get_peft_model(small_model("LlamaConfig", tie_word_embeddings=False), peft.LoraConfig(r=2, **options))
    model.save_pretrained(tmp_path)
    facts = describe_adapter(tmp_path)
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    assert facts.auxiliary == {copy: 64 * 32 * 4, "base_model.model.lm_head.weight": 64 * 32 * 4}
    assert facts.bytes == sum(facts.auxiliary.values()) + sum(layer.bytes for layer in facts.layers)


def test_damaged_files_are_one_sentence(small_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        describe_adapter(tmp_path / "nothing")
    model = small_model("LlamaConfig")
    add_lora_(model, LoraConfig(2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "only LORA is supported"),
        ({"r": "two"}, "rank must be an integer"),
        ({"r": 3}, r"has A and B of ranks \(2, 2\) for \S+q_proj, and adapter_config.json says 3"),
    ):
        config.write_text(json.dumps({**settings, **change}))
        with pytest.raises(CheckpointError, match=message):
            describe_adapter(tmp_path)
    config.write_text(json.dumps(settings))
    save_file({key: tensor for key, tensor in tensors.items() if "0.self_attn.q_proj.lora_A" not in key}, weights)
    with pytest.raises(CheckpointError, match=r"has no matrix lora_A for model\.layers\.0\.self_attn\.q_proj"):
        describe_adapter(tmp_path)
    weights.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        describe_adapter(tmp_path)
