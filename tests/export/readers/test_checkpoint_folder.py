"""Tests of checkpoints described by their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.errors import CheckpointError
from qlora_lite.export import save_quantized
from qlora_lite.export.readers import describe_checkpoint


def with_own_names(model: Any, folder: Path) -> Path:
    """Saves a model under the names that it has in transformers 5."""
    model.config.save_pretrained(folder)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def test_a_plain_checkpoint(small_model: Callable[..., Any], tmp_path: Path) -> None:
    small_model("MixtralConfig", num_hidden_layers=1).bfloat16().save_pretrained(tmp_path)
    found = describe_checkpoint(tmp_path)
    assert found.own_names == () and found.dtypes == ("bfloat16",) and found.packed_by is found.tokenizer_class is None
    assert found.bytes == 2 * sum(
        tensor.numel() for tensor in small_model("MixtralConfig", num_hidden_layers=1).parameters()
    )
    assert found.to_json()["tensors"] == len(found.tensors) == 22
    assert [prefix for prefix, _ in found.parts()] == [""]


def test_names_that_transformers_5_alone_has(small_model: Callable[..., Any], tmp_path: Path) -> None:
    found = describe_checkpoint(with_own_names(small_model("MixtralConfig", num_hidden_layers=1), tmp_path))
    layer = "model.layers.0.mlp"
    assert found.own_names == (f"{layer}.experts.down_proj", f"{layer}.experts.gate_up_proj", f"{layer}.gate.weight")
    same = with_own_names(small_model("LlamaConfig", num_hidden_layers=1), tmp_path / "llama")
    assert describe_checkpoint(same).own_names == ()


def test_a_packed_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    save_quantized(load_quantized(tiny_folder, QuantConfig(format="nf4"), dtype=torch.float32), tmp_path / "packed")
    found = describe_checkpoint(tmp_path / "packed")
    assert found.packed_by == "bitsandbytes" and "uint8" in found.dtypes


def test_folders_that_are_not_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        describe_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        describe_checkpoint(tmp_path)
