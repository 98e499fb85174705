"""Tests of the compatibility of adapters that peft and this package saved."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qlora_lite import LoraConfig, add_lora_, save_adapter
from qlora_lite.checkpoints.base_identity import BaseIdentity
from qlora_lite.errors import ConfigError
from qlora_lite.lora.peft.compatibility import (
    LLAMA_CPP,
    PEFT,
    VLLM,
    check_compatibility,
    llama_cpp_compatibility,
    peft_compatibility,
    vllm_compatibility,
)
from qlora_lite.lora.peft.describe import AdapterDescription, describe_adapter


@pytest.fixture
def ours(small_model: Callable[..., Any], tmp_path: Path) -> Callable[..., AdapterDescription]:
    def make(rank: int = 2, alpha: float = 4, **settings: Any) -> AdapterDescription:
        model = small_model("LlamaConfig")
        add_lora_(model, LoraConfig(rank, alpha, **settings))
        save_adapter(model, tmp_path / "ours", overwrite=True)
        return describe_adapter(tmp_path / "ours")

    return make


@pytest.fixture
def theirs(small_model: Callable[..., Any], tmp_path: Path) -> Callable[..., AdapterDescription]:
    def make(family: str = "LlamaConfig", change: dict[str, Any] | None = None, **options: Any) -> AdapterDescription:
        import peft

        model = peft.get_peft_model(small_model(family), peft.LoraConfig(**{"r": 2, "lora_alpha": 4, **options}))
        model.save_pretrained(tmp_path / "theirs")
        path = tmp_path / "theirs" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **(change or {})}))
        return describe_adapter(tmp_path / "theirs")

    return make


def test_a_plain_adapter_is_accepted_by_all(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    for facts in (
        ours(),
        ours(16, layers_to_transform=[1], exclude_modules=["q_proj"]),
        theirs(target_modules="all-linear"),
    ):
        found = check_compatibility(facts)
        assert list(found) == [PEFT, VLLM, LLAMA_CPP] and found[PEFT].accepted
        assert found[VLLM].to_json() == {"accepted": True, "reasons": [], "notes": []}
        assert found[LLAMA_CPP].accepted
    assert "base_model_name_or_path is not set" in llama_cpp_compatibility(ours()).notes[0]


def test_ranks_are_held_against_vllms_setting(ours: Callable[..., Any]) -> None:
    facts = ours(4, rank_pattern={"q_proj": 24})
    (reason,) = vllm_compatibility(facts).reasons
    assert reason == "rank 24 is above max_lora_rank 16; --max-lora-rank 32 is enough"
    fits = vllm_compatibility(facts, 32)
    assert fits.accepted and "older vLLM does not read them" in fits.notes[0]
    # Each layer's rank is read from its matrix there.
    assert llama_cpp_compatibility(facts).accepted
    with pytest.raises(ConfigError, match=r"max_lora_rank must be one of 1, 8, 16, .*; got 24"):
        vllm_compatibility(facts, 24)


def test_dora_is_refused_by_both(ours: Callable[..., Any]) -> None:
    found = check_compatibility(ours(variant="dora"))
    refused, foreign = found[VLLM].reasons
    assert refused == "use_dora: vLLM does not support it" and "lora_magnitude_vector, and 11 more" in foreign
    assert found[LLAMA_CPP].reasons[0].startswith("use_dora: magnitudes")


def test_scales_that_gguf_cannot_hold_are_refused_by_name(ours: Callable[..., Any]) -> None:
    for settings, reason in (
        ({"use_rslora": True}, "use_rslora: not read, each layer would be scaled by alpha / rank"),
        ({"alpha_pattern": {"q_proj": 9}}, "alpha_pattern: not read, every layer would get lora_alpha"),
        ({"alpha": 0}, "lora_alpha 0: llama.cpp takes it for a scale of 1"),
    ):
        found = check_compatibility(ours(**settings))
        assert found[LLAMA_CPP].reasons == (reason,) and found[VLLM].accepted
    assert llama_cpp_compatibility(ours(1, use_rslora=True)).accepted


def test_what_peft_saves_beside_is_refused_by_name(theirs: Callable[..., Any]) -> None:
    found = check_compatibility(theirs(target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all"))
    key = "base_model.model.lm_head.weight"
    assert set(found[VLLM].reasons) == {
        "modules_to_save: vLLM does not support it",
        "bias: vLLM does not support it",
        f"unsupported LoRA weights: {key}",
    }
    assert found[LLAMA_CPP].reasons == (f"not a lora_A or lora_B tensor, the converter stops: {key}",)
    found = check_compatibility(theirs(target_modules=["q_proj"], trainable_token_indices=[1]))
    assert (
        "trainable_tokens_delta" in found[VLLM].reasons[0] and "trainable_tokens_delta" in found[LLAMA_CPP].reasons[0]
    )
    found = check_compatibility(
        theirs(target_modules=["q_proj"], change={"init_lora_weights": "pissa", "layer_replication": [1]})
    )
    assert found[LLAMA_CPP].reasons[1] == "layer_replication: not read"
    for program in (VLLM, LLAMA_CPP):
        assert any(reason.startswith("init_lora_weights='pissa'") for reason in found[program].reasons)


def test_embeddings_go_where_they_are_named_as_llamas(theirs: Callable[..., Any], tmp_path: Path) -> None:
    llama = theirs(target_modules=["embed_tokens", "lm_head"])
    assert (
        vllm_compatibility(llama).accepted
        and "only for models with embedding_modules" in vllm_compatibility(llama).notes[0]
    )
    assert "lm_head: refused for bases" in llama_cpp_compatibility(llama).notes[-1]
    gpt = vllm_compatibility(theirs("GPT2Config", target_modules=["wte"]))
    assert gpt.reasons == ("embeddings that vLLM's models do not name in embedding_modules: transformer.wte",)


def test_keys_that_name_the_adapter_are_read_here_and_by_neither(ours: Callable[..., Any], tmp_path: Path) -> None:
    ours(target_modules=["q_proj"])
    path = tmp_path / "ours" / "adapter_model.safetensors"
    save_file({key.replace(".weight", ".default.weight"): t for key, t in load_file(path).items()}, path)
    facts = describe_adapter(tmp_path / "ours")
    assert len(facts.layers) == 2
    for program in (VLLM, LLAMA_CPP):
        assert "q_proj.lora_A.default.weight" in check_compatibility(facts)[program].reasons[0]


def test_peft_is_held_against_the_type_of_the_base(ours: Callable[..., Any]) -> None:
    facts = dataclasses.replace(ours(exclude_modules=["q_proj"]), trained_on=None)
    assert peft_compatibility(facts).notes == (
        "the type of the base is unknown: with some kinds of experts peft would not load down_proj, gate_proj, up_proj",
    )
    assert peft_compatibility(dataclasses.replace(ours(target_modules=["q_proj"]), trained_on=None)).notes == ()
    for model_type, accepted in (("llama", True), ("qwen3_moe", False), ("mamba", True)):
        of_type = dataclasses.replace(facts, trained_on=BaseIdentity({"model_type": model_type}, None))
        found = peft_compatibility(of_type)
        assert found.accepted is accepted and not found.notes
