"""Loading against transformers' own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.errors import CheckpointError

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
