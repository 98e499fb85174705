"""Tests of target selection against peft, and of the errors for settings without effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite import LoraConfig, add_lora_, load_adapter_, save_adapter
from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.targets import block_number, exclusions_for, layer_numbers, left_out_of_all_linear, select_targets

TOKENS = torch.arange(12).view(2, 6)


def test_names_patterns_and_predicates(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig")
    names = [layer.name for layer in select_targets(model, LoraConfig())]
    assert len(names) == 14 and "lm_head" not in names
    for targets, count in (
        (["q_proj", "v_proj"], 4),
        (["layers.1.self_attn.q_proj"], 1),
        (r".*layers\.0\.mlp\..*", 3),
        (lambda name, module: name.endswith("down_proj"), 2),
        (["embed_tokens"], 1),
    ):
        assert len(select_targets(model, LoraConfig(target_modules=targets))) == count
    for targets in (["q_porj", "v_proj"], "nothing", "(", lambda name, module: False):
        with pytest.raises(TargetError, match="target_modules"):
            select_targets(model, LoraConfig(target_modules=targets))


# Of peft's LoraConfig; ours has the same meaning under the names below.
COMBINATIONS = [
    ("LlamaConfig", {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.1.mlp.up_proj"]}),
    ("LlamaConfig", {"target_modules": "all-linear", "exclude_modules": r".*\.(1\.mlp|0\.self_attn)\..*"}),
    ("LlamaConfig", {"target_modules": ["q_proj", "mlp.up_proj", "embed_tokens"], "layers_to_transform": 1}),
    ("LlamaConfig", {"target_modules": r".*\.[qv]_proj", "exclude_modules": ["v_proj"]}),
    ("LlamaConfig", {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    ("GPT2Config", {"target_modules": "all-linear", "exclude_modules": ["attn.c_proj"]}),
    (
        "GPT2Config",
        {"target_modules": ["c_attn", "c_fc", "wte"], "exclude_modules": ["attn.c_attn"], "layers_to_transform": [1]},
    ),
]


def ours_of(theirs: dict[str, Any]) -> dict[str, Any]:
    """The same settings as fields of our LoraConfig."""
    settings = {key: theirs[key] for key in ("target_modules", "exclude_modules") if key in theirs}
    if (layers := theirs.get("layers_to_transform")) is not None:
        settings["layers_to_transform"] = [layers] if isinstance(layers, int) else layers
    return settings


@pytest.mark.parametrize(("family", "settings"), COMBINATIONS)
def test_layers_are_those_of_peft_in_memory_and_in_files_both_ways(
    small_model: Callable[..., Any], tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    import peft

    theirs = peft.get_peft_model(
        small_model(family), peft.LoraConfig(r=2, fan_in_fan_out=family == "GPT2Config", **settings)
    )
    meant = set(theirs.base_model.targeted_module_names)
    ours = small_model(family)
    assert set(add_lora_(ours, LoraConfig(2, 8, **ours_of(settings)))) == meant
    for layer in lora_layers(ours).values():
        nn.init.normal_(layer.lora_B)
    save_adapter(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(small_model(family), tmp_path / "ours")
    assert set(read.base_model.targeted_module_names) == meant
    torch.testing.assert_close(read.eval()(TOKENS).logits, ours.eval()(TOKENS).logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert set(load_adapter_(small_model(family), tmp_path / "theirs")) == meant


def test_functions_and_numbers_compose_with_all_linear(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig", num_hidden_layers=3)
    config = LoraConfig(
        layers_to_transform=range(1, 3), exclude_modules=lambda name, layer: "mlp" in name or ".2." in name
    )
    # Block 2 has no effect: the function excludes all of its layers.
    with pytest.raises(
        TargetError, match=r"layers_to_transform \[2\] contain no targeted layer; .* are in blocks 0 to 1$"
    ):
        select_targets(model, config)
    config = LoraConfig(layers_to_transform=[1], exclude_modules=config.exclude_modules)
    assert [layer.name.rpartition(".")[2] for layer in select_targets(model, config)] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"layers_to_transform": [1, 2, 7]},
            r"layers_to_transform \[2, 7\] contain no targeted layer; the targeted layers are in blocks 0 to 1$",
        ),
        (
            {"layers_to_transform": [0], "target_modules": ["lm_head"]},
            r"layers_to_transform \[0\] contain .* are in no numbered block",
        ),
        (
            {"exclude_modules": ["lm_head", "self_att", "self_attn.k", "q_proj"]},
            r"exclude_modules \['lm_head', 'self_att', 'self_attn.k'\] excludes no targeted layer; targeted",
        ),
        (
            {"exclude_modules": ["layers.1.mlp.up_proj"], "layers_to_transform": [0]},
            r"\['layers.1.mlp.up_proj'\] excludes no",
        ),
        ({"exclude_modules": "q_proj"}, r"exclude_modules \['q_proj'\] excludes no"),
        ({"exclude_modules": lambda name, layer: False}, "exclude_modules .*lambda.* excludes no"),
        ({"exclude_modules": "("}, r"exclude_modules '\(' is not a regular expression"),
        ({"exclude_modules": ".*"}, "exclude_modules leaves none of the 14 targeted layers"),
    ],
)
def test_what_decides_nothing_is_named(small_model: Callable[..., Any], settings: dict[str, Any], message: str) -> None:
    model = small_model("LlamaConfig")
    with pytest.raises(TargetError, match=message):
        add_lora_(model, LoraConfig(**settings))
    assert not lora_layers(model)


@pytest.mark.parametrize("part", ["self_attn", "layers.1.self_attn", "1", "1.self_attn.q_proj", "model.layers.1"])
def test_any_part_of_a_path_can_be_excluded(small_model: Callable[..., Any], part: str) -> None:
    model = small_model("LlamaConfig")
    every = [layer.name for layer in select_targets(model, LoraConfig())]
    left = [layer.name for layer in select_targets(model, LoraConfig(exclude_modules=[part]))]
    assert left == [name for name in every if f".{part}." not in f".{name}."]
    assert 0 < len(left) < len(every)


def test_exclusions_are_few_short_and_exact() -> None:
    tower = [f"model.vision_tower.layers.{n}.{part}" for n in range(12) for part in ("attn.q_proj", "mlp.fc1")]
    text = [f"model.language_model.layers.{n}.{part}" for n in range(12) for part in ("attn.q_proj", "mlp.fc1")]
    cross = [f"model.language_model.layers.{n}.cross_attn.{part}" for n in range(12) for part in ("q_proj", "k_proj")]
    assert exclusions_for(tower, text) == {"vision_tower": sorted(tower)}
    assert exclusions_for([*cross, *tower], text) == {"vision_tower": sorted(tower), "cross_attn": sorted(cross)}
    assert exclusions_for(tower[:2], tower[2:]) == {"layers.0": sorted(tower[:2])}
    assert list(exclusions_for(["a.0", "b.1"], ["a.1", "b.0"])) == ["a.0", "b.1"]
    assert exclusions_for([], text) == {}


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Read(nn.Module):
    """Reads the weight of one layer, and calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x @ self.read.weight)


def test_all_linear_leaves_out_what_an_adapter_cannot_act_on() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4), Read())
    assert left_out_of_all_linear(model) == {
        "1": "a Doubled has a forward of its own",
        "2.read": "Read.forward reads its weight",
    }
    assert [layer.name for layer in select_targets(model, LoraConfig())] == ["0", "2.called"]
    for exclude in (["1"], ["read", "1"], "1", lambda name, layer: isinstance(layer, Doubled)):
        chosen = select_targets(model, LoraConfig(exclude_modules=exclude))
        assert [layer.name for layer in chosen] == ["0", "2.called"]
    with pytest.raises(TargetError, match=r"2\.read: Read\.forward reads its weight instead of calling it, so an"):
        select_targets(model, LoraConfig(target_modules=["read"]))
    with pytest.raises(TargetError, match=r"target_modules \['1'\] matched no layer"):
        select_targets(model, LoraConfig(target_modules=["1"]))


def test_layers_with_several_names_are_targeted_by_their_first() -> None:
    model = nn.Module()
    model.a = model.b = nn.Linear(4, 4)
    model.c = nn.Linear(4, 4)
    for targets in (["a"], "[ab]", "all-linear", lambda name, layer: True):
        layers = select_targets(model, LoraConfig(target_modules=targets))
        assert [layer.name for layer in layers if layer.module is model.a] == ["a"]
    for names in (["b"], ["c", "b"]):
        with pytest.raises(TargetError, match=r"target_modules \['b'\] match layers that .*; use the first: a$"):
            add_lora_(model, LoraConfig(target_modules=names))
    for targets in ("b", lambda name, layer: name == "b"):
        with pytest.raises(TargetError, match=r"target_modules .* matched no layer"):
            add_lora_(model, LoraConfig(target_modules=targets))
    with pytest.raises(TargetError, match=r"exclude_modules \['b'\] excludes no targeted layer; targeted are: a, c"):
        add_lora_(model, LoraConfig(exclude_modules=["b"]))
    assert not lora_layers(model) and model.a is model.b


def test_each_target_is_resolved_once_with_its_own_numbers(small_model: Callable[..., Any]) -> None:
    model = small_model("MixtralConfig")
    config = LoraConfig(
        rank=4,
        alpha=8,
        target_modules=["q_proj", "embed_tokens", "mlp.gate", "experts.down_proj"],
        rank_pattern={"down_proj": 2, "layers.1.*q_proj": 3},
        alpha_pattern={"embed_tokens": 1.5},
    )
    layers = {layer.name: layer for layer in select_targets(model, config)}
    assert {name: (layer.rank, layer.alpha) for name, layer in layers.items() if ".1." in name or "emb" in name} == {
        "model.embed_tokens": (4, 1.5),
        "model.layers.1.self_attn.q_proj": (3, 8),
        "model.layers.1.mlp.gate": (4, 8),
        "model.layers.1.mlp.experts.down_proj": (2, 8),
    }
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        assert layer.is_stack == ("experts" in name) and layer.is_router == name.endswith("gate")
        assert layer.is_stack or layer.module is modules[name]
        assert layer.peft_name == (f"{name}.weight" if layer.is_router else name)
        assert layer.is_stack or layer.kind.features(layer.module)[0] == (64 if "embed" in name else 32)


def test_all_linear_leaves_out_what_modules_to_save_names(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig")
    layers = select_targets(model, LoraConfig(modules_to_save=["down_proj"]))
    assert len(layers) == 12 and not any("down_proj" in layer.name for layer in layers)
    named = LoraConfig(target_modules=["down_proj"], modules_to_save=["down_proj"])
    assert len(select_targets(model, named)) == 2


def test_number_of_a_block_is_the_first_in_the_name() -> None:
    names = ("model.layers.7.mlp.experts.3.up", "layers.2.q", "h.0.1.q", "lm_head", "0.q", "model.layers.4", "m.x2.q")
    assert [block_number(name) for name in names] == [7, 2, 0, None, None, None, None]


def test_numbers_and_ranges_of_a_command_line() -> None:
    assert layer_numbers("0-3, 12") == [0, 1, 2, 3, 12]
    for text in ("", "3-1", "1,", "-1", "x", "1--2"):
        with pytest.raises(ConfigError, match="numbers and ranges such as 0-7,12"):
            layer_numbers(text)
