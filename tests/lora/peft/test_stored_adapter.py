"""Tests of adapter files that do not fit a model: each error is named, and nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_adapter_, load_quantized, save_adapter
from qlora_lite.errors import CheckpointError
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.peft.stored_adapter import StoredAdapter


def base(folder: Path) -> Any:
    return load_quantized(folder, QuantConfig(format="none"), dtype=torch.float32)


def adapted(folder: Path, targets: list[str]) -> Any:
    model = base(folder)
    add_lora_(model, LoraConfig(rank=3, alpha=7, target_modules=targets))
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    return model.eval()


def test_a_stored_adapter_has_the_layers_and_numbers_of_the_file(tiny_folder: Path, tmp_path: Path) -> None:
    model = base(tiny_folder)
    add_lora_(model, LoraConfig(rank=3, alpha=7, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}))
    save_adapter(model, tmp_path / "a")
    plain = base(tiny_folder)
    stored = StoredAdapter.read(plain, tmp_path / "a")
    assert (
        stored.layers.keys() == stored.layer_tensors.keys() == lora_layers(model).keys() and not stored.parameter_layers
    )
    for name, layer in stored.layers.items():
        assert layer.module is plain.get_submodule(name)
        assert (layer.rank, layer.alpha) == (2 if "v_proj" in name else 3, 7)
        assert torch.equal(stored.layer_tensors[name]["lora_A"], lora_layers(model)[name].lora_A)
    assert not lora_layers(plain)


@pytest.mark.parametrize("damage", ["other values", "no head"])
def test_tied_adapters_that_are_not_the_same_are_refused(tiny_folder: Path, tmp_path: Path, damage: str) -> None:
    save_adapter(adapted(tiny_folder, ["lm_head", "embed_tokens"]), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": None, "ensure_weight_tying": True}))
    if damage == "no head":
        path = tmp_path / "a" / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(path).items() if "lm_head" not in key}, path)
    message = (
        r"ensure_weight_tying is set, and lm_head\.weight and model\.embed_tokens\.weight do not have the same adapter"
    )
    with pytest.raises(CheckpointError, match=message):
        load_adapter_(base(tiny_folder), tmp_path / "a")


def _drop_a(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors.pop(next(name for name in tensors if "lora_A" in name))


def _wrong_shape(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = torch.zeros(5, 3)


def _foreign(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)


def _stranger(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for part in ("A", "B"):
        tensors[f"base_model.model.x.lora_{part}.weight"] = torch.zeros(3, 3)


def _nan(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _embedding_key(key: str) -> str:
    return key.removesuffix(".weight").replace("lora_", "lora_embedding_")


def _another_kind(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for key in [key for key in tensors if ".0." in key]:
        tensors[_embedding_key(key)] = tensors.pop(key)


def _two_kinds(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors |= {_embedding_key(key): 2 * tensor for key, tensor in tensors.items() if ".0." in key}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _another_kind,
            r"q_proj is a layer of another kind in this model: "
            r"the file should have \S+lora_A\.weight and \S+lora_B\.weight",
        ),
        (_two_kinds, r"repeat a tensor of a layer: \S+layers\.0\.self_attn\.q_proj\.lora_embedding_A"),
        (lambda tensors, config: config.update(target_modules="v_proj|x"), "'v_proj\\|x' matches no layer in the file"),
        (_drop_a, "only one of A and B"),
        (_wrong_shape, r"is \(5, 3\), the layer needs"),
        (_foreign, "belong to no adapter"),
        (_stranger, "x is not a layer of this model"),
        (_nan, "NaN or infinity"),
        (lambda tensors, config: config.update(use_dora=True), "has no magnitudes and use_dora says otherwise"),
        (lambda tensors, config: config.update(use_rslora=1), "use_rslora must be True or False; got 1"),
        (lambda tensors, config: config.update(rank_pattern={"q": 2}), r"rank_pattern \['q'\] decides for no adapted"),
        (lambda tensors, config: config.update(rank_pattern={"q_proj": 2}), r"is \(3, 64\), the layer needs \(2, 64\)"),
        (lambda tensors, config: config.update(alpha_pattern={"(": 2}), r"alpha_pattern '\(' is not a regular"),
        (lambda tensors, config: config.update(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lambda tensors, config: config.update(r=-1), "rank must be"),
        (lambda tensors, config: config.update(lora_alpha="x"), "alpha must be"),
        (lambda tensors, config: config.update(peft_type="IA3"), "only LORA"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    tiny_folder: Path, tmp_path: Path, damage: Callable[[Any, Any], None], message: str
) -> None:
    save_adapter(adapted(tiny_folder, ["q_proj"]), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    damage(tensors, config)
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    model = base(tiny_folder)
    with pytest.raises(CheckpointError, match=message):
        load_adapter_(model, tmp_path / "a")
    assert not lora_layers(model)


def test_targets_that_other_models_have_are_no_loss(tiny_folder: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    config = peft.LoraConfig(target_modules=["q_proj", "c_attn", "query_key_value"])
    peft.get_peft_model(plain, config).save_pretrained(tmp_path)
    assert len(load_adapter_(base(tiny_folder), tmp_path)) == 2


def test_a_file_that_lost_layers_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    save_adapter(adapted(tiny_folder, ["q_proj", "v_proj"]), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(path)
    save_file({key: value for key, value in whole.items() if "layers.0.self_attn.q_proj" not in key}, path)
    with pytest.raises(CheckpointError, match=r"1 targeted layers have no tensors in the file: .*0.self_attn.q"):
        load_adapter_(base(tiny_folder), tmp_path / "adapter")
    save_file(whole, path)
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text())
    for targets, message in (
        (["nothing", "nowhere"], r"target_modules \['nothing', 'nowhere'\] match no layer in the file"),
        (["q_proj", "v_proj", "norm"], r"target_modules \['norm'\] match no layer in the file"),
        (r".*\.[qkv]_proj", "2 targeted layers have no tensors"),
        ("(", "not a regular expression"),
        (7, "a list of names or a regular expression; got 7"),
    ):
        config.write_text(json.dumps({**settings, "target_modules": targets}))
        with pytest.raises(CheckpointError, match=message):
            load_adapter_(base(tiny_folder), tmp_path / "adapter")
    for targets in (r".*\.[qv]_proj", "all-linear", None):
        config.write_text(json.dumps({**settings, "target_modules": targets}))
        assert len(load_adapter_(base(tiny_folder), tmp_path / "adapter")) == 4
    config.write_text(json.dumps({**settings, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}))
    save_file({key: value for key, value in whole.items() if "layers.0" not in key}, path)
    assert len(load_adapter_(base(tiny_folder), tmp_path / "adapter")) == 2
