"""The settings of a run as a configuration file has them. They are the parameters of the command `train`, read from it.

A key of the file is the name of an option with underscores. Types, defaults and sentences are those of the option, and
`InFile` in its declaration says what the texts of an option mean (cli/options.py).
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import typer
from typer.models import OptionInfo

from qlora_lite.cli.options import InFile

# The sections of file and help, each by the parameter that it begins with; a parameter belongs to the section in which
# it is declared.
SECTIONS = {
    "model": "Model",
    "from_adapter": "Adapter",
    "data": "Data",
    "steps": "Training",
    "eval_data": "Evaluation",
    "output": "Output",
    "resume": "This call",
}
# What one call of the command does with a run is no setting of the run.
OF_A_CALL = "This call"
# Of these pairs a run has one; a flag takes the place of the other one in a file.
ALTERNATIVES = (
    ("steps", "epochs"),
    ("warmup_steps", "warmup_ratio"),
    ("checkpointing", "memory_budget"),
    ("eval_data", "eval_share"),
)


@dataclass(frozen=True)
class Setting:
    """A setting: its key, the section of it, and what its values are.

    kind: of one value. several: whether there may be several. required: whether there is no default. optional: whether
    None is a value, which leaves it to the run.
    """

    name: str
    section: str
    kind: type
    several: bool
    required: bool
    optional: bool
    default: Any
    help: str
    in_file: InFile

    @property
    def option(self) -> str:
        """The option of the command line, `--learning-rate`."""
        return f"--{self.name.replace('_', '-')}"

    def words(self) -> tuple[str, ...]:
        """Returns the texts that mean something, in the order in which they are declared."""
        named = self.in_file.words
        if not isinstance(named, str):
            return named
        module, _, name = named.partition(":")
        return tuple(getattr(importlib.import_module(module), name))


def _plain(hint: Any) -> tuple[type, bool, bool]:
    """Returns (type, several, optional) of a hint such as `list[str] | None`."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    (kind,) = [part for part in parts if part is not types.NoneType]
    several = typing.get_origin(kind) is list
    return typing.get_args(kind)[0] if several else kind, several, types.NoneType in parts


def _declared(function: Callable[..., Any]) -> Iterator[Setting]:
    hints, section = typing.get_type_hints(function, include_extras=True), ""
    for parameter in inspect.signature(function).parameters.values():
        section = SECTIONS.get(parameter.name, section)
        hint, *declared = typing.get_args(hints[parameter.name]) or (None,)
        option = next((part for part in declared if isinstance(part, OptionInfo)), None)
        if option is None:
            continue
        kind, several, optional = _plain(hint)
        required = parameter.default is inspect.Parameter.empty
        default = None if required else parameter.default
        in_file = next((part for part in declared if isinstance(part, InFile)), InFile())
        yield Setting(parameter.name, section, kind, several, required, optional, default, option.help or "", in_file)


def options_of(function: Callable[..., Any]) -> dict[str, Setting]:
    """Returns every option of a command by the name of its parameter, those of a call included."""
    return {setting.name: setting for setting in _declared(inspect.unwrap(function))}


def settings_of(function: Callable[..., Any]) -> dict[str, Setting]:
    """Returns the settings of a run by name, in the order of a file: all options but those of a call."""
    return {name: setting for name, setting in options_of(function).items() if setting.section != OF_A_CALL}


def settings_of_command(ctx: typer.Context) -> dict[str, Setting]:
    """Returns the settings of the command that runs."""
    assert ctx.command.callback is not None
    return settings_of(ctx.command.callback)
