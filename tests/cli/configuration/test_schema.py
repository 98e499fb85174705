"""Tests of the settings as they are declared: every option of `train` is a key, and every key an option."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import typer

from qlora_lite import LoraConfig, QuantConfig, TrainConfig
from qlora_lite.cli.configuration import schema
from qlora_lite.cli.configuration.schema import ALTERNATIVES, OF_A_CALL, SECTIONS, options_of, settings_of
from qlora_lite.cli.main import app
from qlora_lite.cli.train import train
from qlora_lite.errors import ConfigError

GROUP: Any = typer.main.get_command(app)
# Options that say what one call does with a run; --help is of every command.
OF_CALLS = {"resume", "overwrite", "json", "print_config", "print_schema"}


def test_every_option_has_a_key_and_every_key_an_option() -> None:
    params = {param.name: param for param in GROUP.commands["train"].params if param.param_type_name == "option"}
    settings = settings_of(train)
    assert set(params) - {"help"} == set(settings) | OF_CALLS and not OF_CALLS & set(settings)
    for name, setting in settings.items():
        assert params[name].opts[0] == setting.option == f"--{name.replace('_', '-')}"
        assert (params[name].default, params[name].required) == (setting.default, setting.required), name
        assert params[name].multiple == setting.several and params[name].help == setting.help, name
        assert params[name].rich_help_panel == setting.section, "sections of the help are those of the file"


def test_settings_in_python_have_the_same_names() -> None:
    in_python = {
        field.name for config in (QuantConfig, LoraConfig, TrainConfig) for field in dataclasses.fields(config)
    }
    lost = in_python - set(settings_of(train))
    assert lost == {"compute_dtype", "adapter_dtype", "rank_pattern", "alpha_pattern"}


def test_types_are_those_of_the_declaration() -> None:
    settings = settings_of(train)
    found = {name: (settings[name].kind, settings[name].several, settings[name].optional) for name in settings}
    assert found["model"] == (str, False, False) and found["output"] == (Path, False, False)
    assert found["data"] == (str, True, False) and found["eval_data"] == (str, True, True)
    assert found["epochs"] == (float, False, True) and found["packing"] == (bool, False, False)


# Settings without which some words of another one have no meaning.
NEEDED = {"best_by": {"eval_steps": 1}}


def test_words_are_those_that_the_settings_take() -> None:
    """Each word is accepted where the setting is used, so a file that has it is refused nowhere."""
    words = {name: setting.words() for name, setting in settings_of(train).items() if setting.words()}
    assert words["schedule"] == ("cosine", "linear", "constant") and words["keep_last"] == ("all",)
    for config in (QuantConfig, LoraConfig, TrainConfig):
        for field in dataclasses.fields(config):
            if field.name in ("keep_last", "max_grad_norm", "target_modules"):
                continue  # their words are parsed by the command line
            for word in words.get(field.name, ()):
                config(**{field.name: word, **NEEDED.get(field.name, {})})
            if field.name in words:
                with pytest.raises(ConfigError, match=field.name):
                    config(**{field.name: "quux"})


def test_sections_and_alternatives_name_settings() -> None:
    options = options_of(train)
    assert set(SECTIONS) <= set(options) and {name for pair in ALTERNATIVES for name in pair} <= set(options)
    assert [setting.section for setting in options.values()] == sorted(
        (setting.section for setting in options.values()), key=list(SECTIONS.values()).index
    )
    assert {name for name, option in options.items() if option.section == OF_A_CALL} == OF_CALLS
    assert schema.SECTIONS["resume"] == OF_A_CALL
