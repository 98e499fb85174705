"""Tests of checkpoints that fit a model, and of the errors for those that do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.errors import CheckpointError
from qlora_lite.export.quantized import save_quantized


def packed_folder(source: Path, folder: Path, **quant: Any) -> Path:
    save_quantized(load_quantized(source, QuantConfig(**quant)), folder)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


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


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is packed by gptq, which cannot be read; name a checkpoint"),
        ({"quant_method": "awq", "bits": 4}, "is packed by awq"),
        ({"bits": 4}, "is packed by a method that its config does not name"),
        ("nf4", "should be a JSON object; got 'nf4'"),
        ({"load_in_4bit": True}, "in one format; it has no packed weight"),
        ({"quant_method": "bitsandbytes"}, "in one format; it has no packed weight"),
    ],
)
def test_other_packing_is_refused_by_name(tiny_folder: Path, tmp_path: Path, said: Any, message: str) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "other")
    change_config(folder, quantization_config=said)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(folder)


def test_damaged_statistics_are_all_listed(tiny_folder: Path, tmp_path: Path) -> None:
    folder = packed_folder(tiny_folder, tmp_path / "nf4")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight.absmax"]
    state = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    tensors[state] = tensors[state][:-1].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"0\.mlp\.up_proj\.weight misses absmax; .*1\.mlp.* is not JSON"):
        load_quantized(folder)


def test_packed_weights_that_fit_no_layer_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = packed_folder(tiny_folder, tmp_path / "nf4")
    kept = load_file(folder / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj.weight"
    other = "model.layers.0.mlp.down_proj.weight"
    moved = {name.replace(layer, other): value for name, value in kept.items() if name.startswith(layer)}
    moved = {name: value for name, value in kept.items() if not name.startswith(layer)} | moved
    save_file(moved, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: .*up_proj.*wrong shape: .*down_proj\.weight is \(128, 64\)"):
        load_quantized(folder)
    save_file({**kept, layer.replace("0", "7"): kept[layer].clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"belong to no module: model\.layers\.7\.mlp\.up_proj\.weight"):
        load_quantized(folder)


def test_tied_weights_that_the_checkpoint_has_twice(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_folder, tmp_path / "twice")
    tensors = load_file(tiny_folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    held, expected = load_quantized(tmp_path / "twice").state_dict(), load_quantized(tiny_folder).state_dict()
    assert all(torch.equal(held[name], value) for name, value in expected.items())

    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight are tied by the config"
    ):
        load_quantized(tmp_path / "twice")
    config = json.loads((tiny_folder / "config.json").read_text())
    (tmp_path / "twice" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", dtype=torch.float32)
    ours = load_quantized(tmp_path / "twice", QuantConfig("none"), dtype=torch.float32)
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits)


def test_codes_without_statistics_do_not_pass_for_a_weight(tiny_folder: Path, tmp_path: Path) -> None:
    folder = packed_folder(tiny_folder, tmp_path / "int8", format="int8")
    tensors = load_file(folder / "model.safetensors")
    for part in ("SCB", "weight_format"):
        del tensors[f"model.layers.0.mlp.up_proj.{part}"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors hold integers .*: .*up_proj\.weight is torch\.int8"):
        load_quantized(folder)
