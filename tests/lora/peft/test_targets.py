"""Tests of the layers that a configuration selects, against peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_lite import LoraConfig, add_lora_, load_adapter_, save_adapter
from qlora_lite.errors import CheckpointError
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.peft.targets import layers_peft_adapts, target_problems

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "model.layers.0.mlp.experts.1.up_proj",
    "layers.1.q_proj",
    "encoder.h.1.q_proj",
    "lm_head",
    "up_proj",
]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "lm_head", "up_proj"], "layers_to_transform": [1, 3]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": ["experts", "h"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [], "exclude_modules": ["layers.1.q_proj"]},
        {"target_modules": r".*(q|up)_proj", "exclude_modules": r".*\.1\..*"},
    ],
)
def test_meaning_is_pefts(options: dict[str, Any]) -> None:
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(**options)
    theirs = {name for name in NAMES if check_target_module_exists(config, name)}
    assert theirs and layers_peft_adapts(options, NAMES) == theirs != set(NAMES)


def test_names_that_others_end_with_are_told_apart_for_peft(tmp_path: Path) -> None:
    import peft

    class Nested(nn.Module):
        def __init__(self, **inner: nn.Module) -> None:
            super().__init__()
            self.q, self.inner = nn.Linear(4, 4), nn.ModuleDict(inner)

    def make() -> nn.Module:
        return Nested(q=nn.Linear(4, 4), k=nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)}))

    for number, targets in enumerate((r"q|inner\.k\.k", r"inner\.q", ".*q")):
        model = make()
        meant = set(add_lora_(model, LoraConfig(2, target_modules=targets)))
        save_adapter(model, tmp_path / str(number))
        read = peft.PeftModel.from_pretrained(make(), tmp_path / str(number))
        assert set(read.base_model.targeted_module_names) == meant
        assert set(load_adapter_(make(), tmp_path / str(number))) == meant


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_to_transform": [0]}, "2 layers in the file are left out by exclude_modules or layers_to_transform"),
        ({"exclude_modules": ["up_proj"]}, r"2 layers in the file are left out .*: model\.layers\.0\.mlp\.up_proj, "),
        (
            {"target_modules": ["up_proj", "q_proj", "k_proj"], "exclude_modules": ["1.self_attn.k_proj"]},
            r"\['k_proj'\] match no layer",
        ),
        ({"layers_to_transform": ["0"]}, r"layers_to_transform must be a number .*; got \['0'\]"),
        ({"exclude_modules": "("}, r"exclude_modules '\(' is not a regular expression"),
        ({"exclude_modules": 3}, "exclude_modules must be a list of names or a regular expression; got 3"),
        ({"layers_to_transform": [0], "layers_pattern": ["("]}, "layers_pattern .* is not a regular expression"),
    ],
)
def test_file_and_configuration_that_disagree_are_refused(
    small_model: Callable[..., Any], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = small_model("LlamaConfig")
    add_lora_(model, LoraConfig(2, target_modules=["q_proj", "up_proj"]))
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    plain = small_model("LlamaConfig")
    with pytest.raises(CheckpointError, match=message):
        load_adapter_(plain, tmp_path)
    assert not lora_layers(plain)


def test_a_narrowed_file_that_lost_layers_is_refused(small_model: Callable[..., Any], tmp_path: Path) -> None:
    model = small_model("LlamaConfig")
    add_lora_(model, LoraConfig(2, target_modules=["q_proj", "up_proj"], layers_to_transform=[1]))
    save_adapter(model, tmp_path)
    config = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    assert len(load_adapter_(small_model("LlamaConfig"), tmp_path)) == 2
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(weights).items() if "up_proj" not in key}, weights)
    with pytest.raises(CheckpointError, match=r"target_modules .* match no layer in the file"):
        load_adapter_(small_model("LlamaConfig"), tmp_path)
    plain = small_model("LlamaConfig")
    half = ["model.layers.1.self_attn.q_proj"]
    assert target_problems(plain, half, {**config, "target_modules": r".*(q|up)_proj", "exclude_modules": [".0."]}) == [
        "3 targeted layers have no tensors in the file: model.layers.0.mlp.up_proj, model.layers.0.self_attn.q_proj, "
        "model.layers.1.mlp.up_proj"
    ]


@pytest.mark.parametrize("value", [0, False, {}, 0.0])
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "layers_pattern"])
def test_what_is_no_name_and_counts_as_false_is_named_too(option: str, value: object) -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2)})
    config = {"target_modules": ["first"], option: value}
    (problem,) = target_problems(model, ["first"], config)
    assert problem == f"{option} must be a list of names or a regular expression; got {value!r}"


def test_a_number_of_blocks_that_is_empty_text_is_named() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2)})
    (problem,) = target_problems(model, ["first"], {"target_modules": ["first"], "layers_to_transform": ""})
    assert problem == "layers_to_transform must be a number or a list of numbers; got ''"
