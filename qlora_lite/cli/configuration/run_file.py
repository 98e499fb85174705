"""Reads a configuration file: keys and values against the settings of a run, with everything that is wrong in it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora_lite.checkpoints.files import open_regular
from qlora_lite.cli.configuration.other_names import nearest_name
from qlora_lite.cli.configuration.schema import ALTERNATIVES, OF_A_CALL, Setting, options_of
from qlora_lite.cli.configuration.yaml_text import Listed, Mapped, Node, Scalar, parsed
from qlora_lite.errors import CheckpointError, ConfigError, listing

SUFFIXES = (".yaml", ".yml", ".json")
LARGEST_BYTES = 1 << 20
MOST_PROBLEMS = 20
WORDS_OF_TRUTH = {**dict.fromkeys(("true", "yes", "on"), True), **dict.fromkeys(("false", "no", "off"), False)}
WHOLE_NUMBER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
NUMBER = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")

# What settings without words of their own must be.
ANYTHING = ("a path", "a text")


class _Wrong(Exception):
    """A value that a setting cannot have; the text says what it must be."""


def read_run_file(path: Path, command: Callable[..., Any]) -> dict[str, Any]:
    """Returns the values in a configuration file by the names of the settings of `command`, of their types.

    Settings that are null in the file are left out. Raises ConfigError that lists every unknown or repeated key and
    every value of a wrong type, with its line.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"a configuration is a file named *{listing(SUFFIXES, 9, ', *')}, or the folder of a run; got {path} "
            "(records are given with --data)"
        )
    try:
        with open_regular(path, "a configuration", LARGEST_BYTES) as file:
            text = file.read().decode("utf-8-sig")
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    return checked_values(parsed(text, str(path)), str(path), options_of(command))


def checked_values(root: Node, name: str, options: Mapping[str, Setting]) -> dict[str, Any]:
    """Returns the values of a parsed file. name: of the file, for errors. options: of the command."""
    if not isinstance(root, Mapped):
        raise ConfigError(f"{name} must hold keys with values, as learning_rate: 2e-4; got {root.shown()}")
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    problems: list[tuple[int, str, str]] = []
    for key, node in root.items:
        setting = options.get(key.text)
        if setting is None:
            problems.append((key.line, *_unknown(key.text, node, options)))
        elif setting.section == OF_A_CALL:
            problems.append((key.line, f"{key.text} is no setting of a run", f"give {setting.option} to the command"))
        elif key.text in lines:
            problems.append((key.line, f"{key.text} is given twice", f"it stands in line {lines[key.text]} already"))
        else:
            lines[key.text] = key.line
            try:
                values[key.text] = _value(setting, node)
            except _Wrong as wrong:
                problems.append((node.line, f"{key.text} must be {wrong}, got {node.shown()}", ""))
    if problems:
        raise ConfigError(_in_words(problems, name))
    given = {key: value for key, value in values.items() if value is not None}
    for one, other in ALTERNATIVES:
        if all(name in given and given[name] != options[name].default for name in (one, other)):
            raise ConfigError(
                f"{name} has {one} in line {lines[one]} and {other} in line {lines[other]}, and a run takes one of "
                "them; leave out the other"
            )
    return given


def _in_words(problems: list[tuple[int, str, str]], name: str) -> str:
    if len(problems) == 1:
        ((line, what, hint),) = problems
        return f"{what} in {name} line {line}" + (f"; {hint}" if hint else "")
    texts = (f"line {line}: {what}" + (f" ({hint})" if hint else "") for line, what, hint in sorted(problems))
    return f"{name} has {len(problems)} mistakes: {listing(texts, MOST_PROBLEMS, '; ')}"


def _unknown(key: str, node: Node, options: Mapping[str, Setting]) -> tuple[str, str]:
    """Returns what is wrong with an unknown key, and what to do."""
    what = f"unknown key {key[:60]}"
    if isinstance(node, Mapped) and node.items:
        return what, "settings do not stand in sections but at the left margin"
    near = nearest_name(key, options)
    return what, f"did you mean {near}?" if near else "qlora-lite train --help lists all settings"


def _value(setting: Setting, node: Node) -> Any:
    """Returns the value of a setting as the command line would have it; None for null. Raises _Wrong."""
    if isinstance(node, Scalar) and node.is_null and setting.optional:
        return None
    if setting.in_file.pairs and isinstance(node, Mapped):
        return [f"{key.text}={_text(value, wanted_of(setting))}" for key, value in node.items]
    if setting.several:
        wanted = "a text or a list of texts"
        items = node.items if isinstance(node, Listed) else (node,)
        if not items:
            raise _Wrong(f"{wanted}, at least one")
        return [_text(item, wanted) for item in items]
    if setting.in_file.names and isinstance(node, Listed):
        return _joined(node)
    if not isinstance(node, Scalar):
        raise _Wrong(wanted_of(setting))
    return _scalar(setting, node)


def _joined(node: Listed) -> str:
    """Returns the names of a list with commas between them, as the option has them."""
    names = [_text(item, "a list of names") for item in node.items]
    if any("," in name for name in names):
        raise _Wrong("a list of names without commas")
    return ",".join(names)


def _text(node: Node, wanted: str) -> str:
    if not isinstance(node, Scalar) or node.is_null or not node.text:
        raise _Wrong(wanted)
    return node.text


def _scalar(setting: Setting, node: Scalar) -> Any:
    wanted = wanted_of(setting)
    if setting.kind is bool:
        if node.quoted or node.text.lower() not in WORDS_OF_TRUTH:
            raise _Wrong(wanted)
        return WORDS_OF_TRUTH[node.text.lower()]
    if setting.kind in (int, float):
        return _number(node, setting.kind, wanted)
    if node.is_null or (not node.text and setting.default != ""):
        raise _Wrong(wanted)
    words, in_file = setting.words(), setting.in_file
    if in_file.number is not None and node.text not in words:
        _number(node, in_file.number, wanted)
    elif words and in_file.others is None and node.text not in words:
        raise _Wrong(wanted)
    return node.text


def _number(node: Scalar, kind: type, wanted: str) -> int | float:
    """Returns a number as people write it, `1_000` and `2e-4` too. Quotes make it a text, which is refused."""
    pattern = WHOLE_NUMBER if kind is int else NUMBER
    if node.quoted or pattern.fullmatch(node.text) is None or len(node.text) > 40:
        raise _Wrong(wanted)
    found: int | float = kind(node.text)
    if not math.isfinite(found):
        raise _Wrong(wanted)
    return found


def wanted_of(setting: Setting) -> str:
    """Returns what the value of a setting must be, in words."""
    plain = {bool: "true or false", int: "a whole number", float: "a number"}.get(setting.kind)
    if plain is not None:
        return plain
    if setting.in_file.pairs:
        return "a mapping, as {prompt: question}"
    if setting.several:
        return "a text or a list of texts"
    in_file, words = setting.in_file, list(setting.words())
    if in_file.number is not None:
        words.append("a whole number" if in_file.number is int else "a number")
    if in_file.others is not None:
        words.append(in_file.others)
    if not words:
        return ANYTHING[0] if setting.kind is Path else ANYTHING[1]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
