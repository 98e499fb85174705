"""Writes settings as a configuration file: every key with what it means, what it may be, and its default."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from qlora_lite.cli.configuration.run_file import ANYTHING, checked_values, wanted_of
from qlora_lite.cli.configuration.schema import ALTERNATIVES, Setting, settings_of_command
from qlora_lite.cli.configuration.yaml_text import as_yaml, parsed
from qlora_lite.cli.options import was_given
from qlora_lite.errors import CheckpointError

WIDTH = 79
# In the sentences of the help; a file has keys.
OPTION = re.compile(r"--([a-z][a-z-]*[a-z])")
# The first line of the file in a run's folder. A file without it was written by a person, and is not replaced.
OF_A_RUN = "# The settings of this run, written by qlora-lite train."
RUN_HEADING = (OF_A_RUN, "# `qlora-lite train FOLDER --resume` goes on with the run in this folder.")
PRINTED_HEADING = (
    "# The settings of a run: `qlora-lite train FILE` starts it. A flag behind FILE",
    "# has precedence. Paths are relative to the folder that the command runs in.",
    "# null leaves a setting to the run.",
)
# Settings of the section of adapters that a run has also if it goes on from an adapter.
OF_ANY_ADAPTER = ("from_adapter", "any_base")


def run_as_file(ctx: typer.Context, is_kept: bool) -> str:
    """Returns the settings of the command that runs as a file. is_kept: whether the folder of the run keeps it."""
    settings = settings_of_command(ctx)
    values = resolved(ctx.params)
    left_out: dict[str, str] = {}
    if values["from_adapter"] is not None:
        for name, setting in settings.items():
            if setting.section == settings["from_adapter"].section and name not in OF_ANY_ADAPTER:
                left_out |= {} if was_given(ctx, name) else {name: "that of from_adapter"}
    if is_kept:
        return commented(settings.values(), with_whole_paths(settings.values(), values), RUN_HEADING, left_out)
    text = commented(settings.values(), values, PRINTED_HEADING, left_out)
    checked_values(parsed(text, "the configuration"), "the configuration", settings)
    return text


def commented(
    settings: Iterable[Setting],
    values: Mapping[str, Any],
    heading: Iterable[str],
    left_out: Mapping[str, str] | None = None,
) -> str:
    """Returns a file with a value for every setting, in sections, under the lines of the heading.

    left_out: settings that the file does not have, with what it says in their place.
    """
    parts, section = ["\n".join(heading) + "\n"], ""
    for setting in settings:
        if setting.section != section:
            section = setting.section
            parts.append(f"\n# {f' {section} ':-^{WIDTH - 2}}\n")
        reason = (left_out or {}).get(setting.name)
        written = entry(setting, values[setting.name]) if reason is None else f"# {setting.name}: {reason}\n"
        parts.append("\n" + "".join(map(comment, explained(setting))) + written)
    return "".join(parts)


def check_of_a_run(path: Path) -> None:
    """Raises CheckpointError if a run would replace a file that a person wrote. path: of the file in its folder."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else OF_A_RUN
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not text.startswith(OF_A_RUN):
        raise CheckpointError(
            f"{path} was not written by a run, and this one would replace it; move it, or name another output"
        )


def comment(text: str) -> str:
    """Returns a text as lines of comments."""
    lines = textwrap.wrap(text, WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def explained(setting: Setting) -> tuple[str, str]:
    """Returns the sentences about a setting: what it means, and what it may be, with its default."""
    wanted, said = wanted_of(setting), []
    if wanted not in ANYTHING:
        said.append(f"Values: {wanted}.")
    if "Default:" not in setting.help:
        said.append("Required." if setting.required else f"Default: {_default(setting)}.")
    meaning = OPTION.sub(lambda found: found[1].replace("-", "_"), setting.help)
    return meaning, " ".join(said)


def _default(setting: Setting) -> str:
    if setting.default is None:
        return "null"
    if isinstance(setting.default, bool):
        return str(setting.default).lower()
    return f"{setting.default:g}" if isinstance(setting.default, float) else str(setting.default) or "none of them"


def entry(setting: Setting, value: Any) -> str:
    """Returns the lines of a setting with its value, as the file has them."""
    return as_yaml(setting.name, _in_file(setting, value))


def _in_file(setting: Setting, value: Any) -> object:
    """Returns the value in the form in which the file has it."""
    if setting.several:
        if setting.in_file.pairs and value:
            return dict(pair.split("=", 1) for pair in value)
        texts = [str(item) for item in value or ()]
        return texts[0] if len(texts) == 1 else texts or None
    if setting.in_file.number is not None and isinstance(value, str) and value not in setting.words():
        return setting.in_file.number(value)
    return str(value) if isinstance(value, Path) else value


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values with those that a run takes where neither of two alternatives is given."""
    from qlora_lite.training.config import TrainConfig

    found = dict(values)
    for one, other in ALTERNATIVES:
        if found[one] is None and found[other] is None and hasattr(TrainConfig, one):
            found[one] = getattr(TrainConfig, one)
    return found


def with_whole_paths(settings: Iterable[Setting], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values with absolute paths, so that the file means the same in any folder.

    What names no file and no folder, as an id on the hub does, stays as it is.
    """
    found = dict(values)
    for setting in settings:
        value = found[setting.name]
        if value is None:
            continue
        if setting.kind is Path:
            found[setting.name] = Path(os.path.abspath(value))
        elif setting.in_file.path and setting.several:
            found[setting.name] = [_whole_source(text) for text in value]
        elif setting.in_file.path and os.path.exists(value):
            found[setting.name] = os.path.abspath(value)
    return found


def _whole_source(text: str) -> str:
    """Returns a source of records with an absolute path, and with the split and the weight that it has."""
    from qlora_lite.data.sources.source import parse_source

    location = parse_source(text).location
    for place in (location, location.rpartition(":")[0]):
        if place and os.path.exists(place):
            return os.path.abspath(place) + text[len(place) :]
    return text
