"""Tests of the choices in force, and of those that a user names."""

from __future__ import annotations

import pytest

from qlora_lite.choices import (
    ALTERNATIVES,
    ATTENTION_FORWARD,
    DEFAULTS,
    INTEGER_PRODUCTS,
    NAMES,
    attention_class,
    choices_in_force,
    chosen,
    keys_of,
    unknown_choices,
    with_overrides,
)
from qlora_lite.errors import ConfigError


def test_the_defaults_hold_outside_of_a_block_and_after_an_error_in_one() -> None:
    assert {key: chosen(key) for key in NAMES} == DEFAULTS == {key: names[0] for key, names in NAMES.items()}
    with pytest.raises(KeyError), choices_in_force({**DEFAULTS, INTEGER_PRODUCTS: "fp32"}):
        assert chosen(INTEGER_PRODUCTS) == "fp32"
        chosen("no such key")
    assert chosen(INTEGER_PRODUCTS) == "int_mm"


def test_a_length_has_one_class_and_every_class_has_a_key() -> None:
    lengths = {1: "short", 256: "short", 257: "medium", 1024: "medium", 1025: "long", 1 << 20: "long"}
    found = {tokens: attention_class("bf16", tokens) for tokens in lengths}
    assert found == {tokens: f"bf16.{name}" for tokens, name in lengths.items()}
    for name, alternatives in ALTERNATIVES.items():
        assert len(alternatives.names) > 1 and alternatives.explained
        assert set(keys_of(name)) <= set(NAMES)
    assert {f"{ATTENTION_FORWARD}.{shapes}" for shapes in found.values()} <= set(NAMES)


def test_a_name_stands_for_its_classes_and_a_later_word_wins() -> None:
    own = with_overrides(DEFAULTS, f"{ATTENTION_FORWARD}=torch, {ATTENTION_FORWARD}.bf16.long = large_products,")
    of_attention = {key: own[key] for key in keys_of(ATTENTION_FORWARD)}
    assert {key for key, name in of_attention.items() if name == "large_products"} == {f"{ATTENTION_FORWARD}.bf16.long"}
    assert {key: name for key, name in own.items() if key not in of_attention}.items() <= DEFAULTS.items()
    assert with_overrides(DEFAULTS, "") == DEFAULTS


def test_what_is_not_known_is_refused_with_what_is() -> None:
    with pytest.raises(ConfigError, match=r"there is no choice named 'attention'; known are: attention_forward, .*g"):
        with_overrides(DEFAULTS, "attention=torch")
    with pytest.raises(ConfigError, match="integer_products must be one of int_mm, fp32; got 'torch'"):
        with_overrides(DEFAULTS, "integer_products=torch")
    with pytest.raises(ConfigError, match="integer_products must be one of int_mm, fp32; got ''"):
        with_overrides(DEFAULTS, "integer_products")
    assert unknown_choices({**DEFAULTS, "speed": "fast", INTEGER_PRODUCTS: "torch"}) == [
        "integer_products=torch (known are: int_mm, fp32)",
        "speed=fast (there is no such key)",
    ]
