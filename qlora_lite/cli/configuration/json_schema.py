"""The settings of a run as a JSON schema, by which editors complete and check a configuration file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qlora_lite.cli.configuration.commented import explained
from qlora_lite.cli.configuration.schema import Setting

DRAFT = "https://json-schema.org/draft/2020-12/schema"
TYPES = {bool: "boolean", int: "integer", float: "number"}


def json_schema(settings: Iterable[Setting]) -> dict[str, Any]:
    """Returns the schema of a file with these settings."""
    settings = list(settings)
    return {
        "$schema": DRAFT,
        "title": "A training run of qlora-lite",
        "type": "object",
        "properties": {setting.name: _property(setting) for setting in settings},
        "additionalProperties": False,
    }


def _property(setting: Setting) -> dict[str, Any]:
    kinds = [*_kinds(setting), *([{"type": "null"}] if setting.optional else [])]
    found: dict[str, Any] = {"description": " ".join(explained(setting))}
    found |= kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    return found if setting.default is None else {**found, "default": setting.default}


def _kinds(setting: Setting) -> list[dict[str, Any]]:
    """Returns the schemas of the values that a setting takes, null aside."""
    if setting.kind in TYPES:
        return [{"type": TYPES[setting.kind]}]
    text: dict[str, Any] = {"type": "string"}
    texts = {"type": "array", "items": text}
    in_file, words = setting.in_file, setting.words()
    if in_file.pairs:
        return [{"type": "object", "additionalProperties": text}, texts, text]
    if setting.several:
        return [text, {**texts, "minItems": 1}]
    if in_file.names:
        return [{"type": "array", "items": {"type": ["string", "integer"]}}, text, {"type": "integer"}]
    kinds: list[dict[str, Any]] = [{"enum": list(words)}] if words else []
    if in_file.number is not None:
        kinds.append({"type": TYPES[in_file.number]})
    if in_file.others is not None or not words:
        kinds.append(text)
    return kinds
