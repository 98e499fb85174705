"""Loading against transformers' own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.errors import CheckpointError, QuantizationError

TOKENS = torch.arange(10).unsqueeze(0)


def test_unpacked_it_is_the_model_of_transformers(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = load_quantized(tiny_folder, QuantConfig(format="none"), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
    assert all(torch.equal(b, dict(theirs.named_buffers())[n]) for n, b in ours.named_buffers())
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_what_does_not_fit_is_listed(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    lost = tensors.pop("model.norm.weight")
    save_file({**tensors, "stranger": lost}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight; 1 tensors belong to no module: stranger"):
        load_quantized(folder)
    save_file({**tensors, "model.norm.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \(3,\), the model has \(64,\)"):
        load_quantized(folder)


@pytest.mark.parametrize("family", ["Gemma3TextConfig", "Qwen2Config", "OPTConfig", "MistralConfig"])
def test_other_families_load_as_transformers_loads_them(family: str, tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "OPTConfig":
        sizes |= {"ffn_dim": 32, "word_embed_proj_dim": 32}
    else:
        sizes |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32}
    theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, family)(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_quantized(tmp_path, QuantConfig(format="none"), dtype=torch.float32)
    assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)


def test_values_that_are_not_finite_are_named_wherever_they_are(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, folder / "model.safetensors")
    load_quantized(folder)
    with pytest.raises(QuantizationError, match=r"model\.norm\.weight holds inf at index \(3,\)"):
        load_quantized(folder, dtype=torch.float16)
