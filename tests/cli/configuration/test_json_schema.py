"""Tests of the JSON schema, which editors use."""

from __future__ import annotations

from typing import Any

from qlora_lite.cli.configuration.json_schema import json_schema
from qlora_lite.cli.configuration.schema import settings_of
from qlora_lite.cli.train import train


def test_every_setting_is_a_property_and_nothing_else_is_allowed() -> None:
    settings = settings_of(train)
    schema = json_schema(settings.values())
    assert list(schema["properties"]) == list(settings) and schema["additionalProperties"] is False
    for name, found in schema["properties"].items():
        assert settings[name].help.split("--")[0] in found["description"]
        assert found.get("default") == settings[name].default, name


def test_types_and_words() -> None:
    found: dict[str, Any] = json_schema(settings_of(train).values())["properties"]
    assert found["rank"]["type"] == "integer" and found["learning_rate"]["type"] == "number"
    assert found["packing"]["type"] == "boolean" and found["schedule"]["enum"] == ["cosine", "linear", "constant"]
    assert found["epochs"]["anyOf"] == [{"type": "number"}, {"type": "null"}]
    assert found["max_grad_norm"]["anyOf"] == [{"enum": ["none"]}, {"type": "number"}]
    assert found["checkpointing"]["anyOf"] == [{"enum": ["none", "full"]}, {"type": "string"}, {"type": "null"}]
    assert {"type": "array", "items": {"type": "string"}, "minItems": 1} in found["data"]["anyOf"]
    assert found["field"]["anyOf"][0] == {"type": "object", "additionalProperties": {"type": "string"}}
