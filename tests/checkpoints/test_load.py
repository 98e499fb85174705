"""Tests of loading against transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.errors import ConfigError, QuantizationError
from qlora_lite.export.quantized import save_quantized

TOKENS = torch.arange(10).unsqueeze(0)


def test_unpacked_it_is_the_model_of_transformers(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = load_quantized(tiny_folder, QuantConfig(format="none"), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
    assert all(torch.equal(b, dict(theirs.named_buffers())[n]) for n, b in ours.named_buffers())
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in ours.parameters())


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


def packed_folder(source: Path, folder: Path, **quant: Any) -> Path:
    save_quantized(load_quantized(source, QuantConfig(**quant)), folder)
    return folder


def test_a_packed_folder_is_loaded_as_it_is_packed_or_not_at_all(tiny_folder: Path, tmp_path: Path) -> None:
    folder = packed_folder(tiny_folder, tmp_path / "fp4", format="fp4", blocksize=128, double_quant=False)
    for asked in (None, QuantConfig("fp4"), QuantConfig("fp4", skip_modules=("lm_head",))):
        weight = load_quantized(folder, asked).model.layers[0].mlp.up_proj.weight
        assert (weight.format, weight.blocksize, weight.double_quant) == ("fp4", 128, False)
    for other in ("nf4", "int8", "none"):
        with pytest.raises(ConfigError, match=f"is packed as fp4 already; format '{other}' was asked for"):
            load_quantized(folder, QuantConfig(other))
    with pytest.raises(ConfigError, match=r"skip_modules excludes from packing: model\.layers\.0\.mlp\.up_proj, model"):
        load_quantized(folder, QuantConfig("fp4", skip_modules=("up_proj",)))


def test_settings_that_are_no_matter_of_bytes_hold_for_packed_folders_too(tiny_folder: Path, tmp_path: Path) -> None:
    folder = packed_folder(tiny_folder, tmp_path / "int8", format="int8")
    asked = QuantConfig("int8", int8_activations=True, compute_dtype=torch.float32, embedding_format="int8")
    model, plain = load_quantized(folder, asked), load_quantized(tiny_folder, asked)
    layer = model.model.layers[1].mlp.down_proj
    assert layer.weight.int8_activations and layer.compute_dtype == torch.float32
    assert torch.equal(model.lm_head.weight.packed, plain.lm_head.weight.packed)
    assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)


def test_packed_statistics_that_are_not_finite_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = packed_folder(tiny_folder, tmp_path / "int8", format="int8")
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.SCB", "model.layers.1.self_attn.q_proj.SCB"):
        tensors[name][2] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        QuantizationError, match=r"0\.mlp\.up_proj\.SCB holds inf at index \(2,\).*1\.self_attn\.q_proj"
    ):
        load_quantized(folder)
