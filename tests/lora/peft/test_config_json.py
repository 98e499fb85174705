"""Tests of adapter_config.json: peft must read from it what the layers have."""

from __future__ import annotations

import pytest
from torch import nn

from qlora_lite import LoraConfig, add_lora_
from qlora_lite.errors import ConfigError
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.peft.config_json import peft_config
from qlora_lite.lora.targets import adaptable_names


def block() -> nn.Module:
    return nn.ModuleDict({"up": nn.Linear(8, 6), "down": nn.Linear(6, 8), "norm": nn.LayerNorm(8)})


def model() -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList([block(), block()]), "table": nn.Embedding(9, 8)})


def test_layers_that_could_be_adapted_are_named_whether_they_are_or_not() -> None:
    plain, adapted = model(), model()
    add_lora_(adapted, LoraConfig(2, target_modules=["up"]))
    ends = {f"blocks.{number}.{end}" for number in (0, 1) for end in ("up", "down")}
    assert adaptable_names(plain) == adaptable_names(adapted) == ends | {"table"}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["normal", "pissa"])
def test_peft_gives_each_layer_the_rank_and_scale_that_it_has(use_rslora: bool, init: str) -> None:
    import peft

    ours = model()
    ranks, alphas = {"blocks.1.up": 3, "down": 2}, {"blocks.0.*": 5}
    config = LoraConfig(
        4, 8, target_modules=["up", "down"], rank_pattern=ranks, alpha_pattern=alphas, use_rslora=use_rslora
    )
    add_lora_(ours, LoraConfig(**{**vars(config), "init_lora_weights": init}))
    layers = lora_layers(ours)
    said = peft_config(ours, layers)
    theirs = peft.get_peft_model(model(), peft.LoraConfig(**{k: v for k, v in said.items() if k != "peft_type"}))
    for name, layer in layers.items():
        twin = theirs.base_model.model.get_submodule(name)
        assert twin.r["default"] == layer.factors[0].shape[0]
        assert twin.scaling["default"] == pytest.approx(layer.scaling)


def test_one_file_holds_one_dropout() -> None:
    ours = model()
    add_lora_(ours, LoraConfig(2, target_modules=["up"]))
    ours["blocks"][0]["up"].dropout = 0.5
    with pytest.raises(ConfigError, match="have the same dropout"):
        peft_config(ours, lora_layers(ours))
