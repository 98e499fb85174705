"""A command whose options may stand in a configuration file, which its first argument names."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_lite.cli.configuration.run_file import SUFFIXES, read_run_file
from qlora_lite.cli.configuration.schema import ALTERNATIVES, options_of, settings_of_command
from qlora_lite.cli.options import StrictCommand
from qlora_lite.errors import ConfigError, listing

MOST_RUNS = 4


def _print_schema(ctx: typer.Context, wanted: bool) -> None:
    """Prints the JSON schema of the configuration and ends the command, before it misses any option."""
    if wanted:
        from qlora_lite.cli.configuration.json_schema import json_schema

        print(json.dumps(json_schema(settings_of_command(ctx).values()), indent=2))
        raise typer.Exit


Configuration = Annotated[
    Path | None,
    typer.Argument(
        metavar="[FILE|RUN]",
        help="Configuration file, as run.yaml, or the folder of a run, whose configuration it keeps. Options that "
        "follow have precedence.",
    ),
]
PrintConfig = Annotated[
    bool,
    typer.Option("--print-config", help="Print all settings of the run as a configuration file, and do nothing else."),
]
PrintSchema = Annotated[
    bool,
    typer.Option(
        "--print-schema",
        is_eager=True,
        callback=_print_schema,
        help="Print the JSON schema of configuration files, for editors, and do nothing else.",
    ),
]


class ConfiguredCommand(StrictCommand):
    """A command whose parameter `configuration` names a file with values for the others; a flag has precedence."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        sections = {name: option.section for name, option in options_of(self._function()).items()}
        for param in self.params:
            if param.name in sections:
                param.rich_help_panel = sections[param.name]  # type: ignore[attr-defined]

    def _function(self) -> Any:
        assert self.callback is not None
        return inspect.unwrap(self.callback)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the file, so that options which are not given have its values."""
        given, _, order = self.make_parser(ctx).parse_args(args=list(args))
        named = {param.name for param in order}
        place = given.get("configuration")
        if isinstance(place, str) and place and "print_schema" not in named and not ctx.resilient_parsing:
            ctx.default_map = _values(Path(place), self._function(), named)
        return super().parse_args(ctx, args)


def _values(place: Path, function: Any, named: Collection[str]) -> dict[str, Any]:
    """Returns what a file or the folder of a run says about the options that the command line does not name."""
    is_run = os.path.isdir(place)
    if not os.path.lexists(place) and ("resume" in named or place.suffix not in SUFFIXES):
        raise ConfigError(_no_run(place))
    values = read_run_file(_file_of_run(place, named) if is_run else place, function)
    if is_run:
        values["output"] = place  # also of a run that was moved
    replaced = set(_replaced(named))
    return {name: value for name, value in values.items() if name not in replaced}


def _no_run(folder: Path) -> str:
    """Returns the sentence about a run, or a configuration, that does not exist, with those that are near."""
    from qlora_lite.checkpoints.files import did_you_mean
    from qlora_lite.training.run_checkpoints import is_run

    hint = did_you_mean(folder, lambda path: is_run(path) or path.suffix in SUFFIXES)
    if not hint and folder.parent.is_dir():
        runs = sorted(path.name for path in folder.parent.iterdir() if is_run(path))
        hint = f"; {folder.parent} has {listing(runs, MOST_RUNS)}" if runs else ""
    return f"there is no run {folder}: name the folder of a run, or a configuration file, *{SUFFIXES[0]}{hint}"


def _replaced(named: Collection[str]) -> Iterator[str]:
    """Yields the settings of a file whose place options of the command line take."""
    for pair in ALTERNATIVES:
        if not named.isdisjoint(pair):  # type: ignore[attr-defined]
            yield from pair


def _file_of_run(folder: Path, named: Collection[str]) -> Path:
    """Returns the configuration in the folder of a run.

    Raises ConfigError for a folder without one, and if the command line does not say what to do with the run.
    """
    from qlora_lite.training.run_checkpoints import RUN_FILE

    file = folder / RUN_FILE
    if not os.path.isfile(file):
        raise ConfigError(f"{folder} has no {RUN_FILE}, so it is not the folder of a run; name a configuration file")
    if not {"resume", "overwrite", "output", "print_config"} & {*named}:
        raise ConfigError(
            f"{folder} holds a run; --resume goes on with it, --overwrite starts it again, and --output names the "
            "folder of another one"
        )
    return file
