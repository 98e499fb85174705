"""Tests of what other programs would misread of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.errors import ConfigError
from qlora_lite.export.readers import check_readers, describe_checkpoint
from qlora_lite.lora.peft.compatibility import LLAMA_CPP, VLLM

TRANSFORMERS_4 = "transformers-4"


@pytest.fixture(scope="module")
def checkpoint(make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as transformers 5 saves it."""
    folder = tmp_path_factory.mktemp("llama")
    make_model("LlamaConfig", num_hidden_layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reasons(folder: Path, program: str, **changes: Any) -> str:
    """The reasons of a program, with changes of the description, as one text."""
    described = dataclasses.replace(describe_checkpoint(folder), **changes)
    return "\n".join(check_readers(described, [program])[program].reasons)


def test_old_spellings_are_missed_by_old_readers(checkpoint: Path) -> None:
    file = json.loads((checkpoint / "config.json").read_text())
    assert "rope_theta" not in file and "torch_dtype" not in file
    for program in (TRANSFORMERS_4, VLLM):
        found = reasons(checkpoint, program)
        assert "rope_parameters without rope_theta: the family's default is taken" in found
        assert "dtype without torch_dtype: releases before 4.56 take float32" in found
    complete = {**file, "rope_theta": 10000.0, "torch_dtype": "float32"}
    assert reasons(checkpoint, VLLM, file=complete) == ""
    scaled = {**complete, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
    assert reasons(checkpoint, VLLM, file=scaled) == (
        "rope_parameters of type linear without rope_scaling: positions not scaled"
    )
    inside = {"text_config": {"model_type": "llama", "rope_parameters": {"rope_theta": 1.0}}, "model_type": "x"}
    assert reasons(checkpoint, VLLM, file=inside).startswith(
        "text_config.rope_parameters without text_config.rope_theta:"
    )
    assert reasons(checkpoint, TRANSFORMERS_4, file=complete, tokenizer_class="TokenizersBackend").startswith(
        "tokenizer_class TokenizersBackend: it has no such class"
    )
    assert reasons(checkpoint, TRANSFORMERS_4, file=complete, tokenizer_class="PreTrainedTokenizerFast") == ""


def test_own_names_are_a_reason_everywhere(checkpoint: Path) -> None:
    for program in (TRANSFORMERS_4, VLLM, LLAMA_CPP):
        found = reasons(checkpoint, program, own_names=("model.layers.0.mlp.experts.gate_up_proj",))
        assert "names of tensors that transformers 5 alone has: model.layers.0.mlp.experts.gate_up_proj" in found


def test_llama_cpp(checkpoint: Path, make_model: Callable[..., Any]) -> None:
    assert reasons(checkpoint, LLAMA_CPP) == ""
    described = describe_checkpoint(checkpoint)
    more = {**described.tensors, "model.layers.0.mlp.extra.weight": described.tensors["model.norm.weight"]}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = described.tensors["model.norm.weight"]
    assert reasons(checkpoint, LLAMA_CPP, tensors=more) == (
        "tensors that llama.cpp's llama has no name for: model.layers.0.mlp.extra.weight"
    )
    assert "hidden_act 'gelu', where llama.cpp has 'silu'" in reasons(
        checkpoint, LLAMA_CPP, config=make_model("LlamaConfig", num_hidden_layers=1, hidden_act="gelu").config
    )
    assert "packed by bitsandbytes, which the converter does not unpack" in reasons(
        checkpoint, LLAMA_CPP, packed_by="bitsandbytes"
    )


def test_llama_cpp_of_families_that_are_not_written_here(
    checkpoint: Path, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_model("GPTNeoXConfig", num_hidden_layers=1).save_pretrained(tmp_path / "neox")
    found = check_readers(describe_checkpoint(tmp_path / "neox"))[LLAMA_CPP]
    assert found.accepted and found.notes[0].startswith("gpt_neox: settings and tokenizer are checked for llama, ")
    described = describe_checkpoint(checkpoint)
    described.config.model_type = "unheard_of"
    assert reasons(checkpoint, LLAMA_CPP, config=described.config) == (
        "model type unheard_of: the gguf package has no architecture for it"
    )


def test_a_tokenizer_that_llama_cpp_lacks(tiny_folder: Path) -> None:
    assert "its model is WordLevel, and llama.cpp reads BPE" in reasons(tiny_folder, LLAMA_CPP)


def test_only_llama_cpp_needs_the_package(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = describe_checkpoint(checkpoint)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert set(check_readers(described, [VLLM, TRANSFORMERS_4])) == {VLLM, TRANSFORMERS_4}
    with pytest.raises(ConfigError, match=r"pip install 'qlora-lite\[gguf\]'"):
        check_readers(described)
