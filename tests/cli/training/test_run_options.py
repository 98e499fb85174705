"""Every setting of an adapter, of a run and of a packed base has an option of `train`, with the same default."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import typer

from qlora_lite import LoraConfig, QuantConfig, TrainConfig
from qlora_lite.cli.main import app

# Settings with another default as an option, or none, and why.
WITHOUT_OPTION = {
    "compute_dtype",  # of a packed base: that of the checkpoint's other weights
    "adapter_dtype",  # A and B in 16 bits lose small updates; from Python
    *("rank_pattern", "alpha_pattern", "target_parameters", "layers_pattern"),  # mappings and names of few models
}
AS_TEXT = {"steps": None, "max_grad_norm": "1.0", "keep_last": "2", "checkpointing": None}


def options_of_train() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return {param.name: param for param in group.commands["train"].params}


def test_every_setting_of_a_run_is_an_option_with_its_default() -> None:
    options = options_of_train()
    for setting in dataclasses.fields(TrainConfig):
        assert setting.name in options, f"TrainConfig.{setting.name} has no option"
        assert options[setting.name].default == AS_TEXT.get(setting.name, setting.default), setting.name
        assert options[setting.name].opts[0] == f"--{setting.name.replace('_', '-')}" and options[setting.name].help


@pytest.mark.parametrize("config", [LoraConfig, QuantConfig])
def test_settings_of_adapters_and_base_are_options(config: Any) -> None:
    lost = {setting.name for setting in dataclasses.fields(config)} - options_of_train().keys()
    assert lost <= WITHOUT_OPTION
