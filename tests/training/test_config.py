"""Tests of TrainConfig: wrong settings, and `checkpointing` as a word or a number of bytes."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_lite.errors import ConfigError
from qlora_lite.training.config import TrainConfig, checkpointing_named


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("full", "full"),
        ("none", "none"),
        ("300MiB", 300 * 2**20),
        ("1.5 gib", 3 * 2**29),
        ("7", 7),
        (20 * "9", 10**20 - 1),
    ],
)
def test_a_dial_is_a_word_or_a_size(text: str, wanted: object) -> None:
    assert checkpointing_named(text) == wanted


@pytest.mark.parametrize("text", ["half", "MiB", "3 parsecs", "-1", "1e400", 5000 * "9"])
def test_no_dial_is_made_of_other_words(text: str) -> None:
    with pytest.raises(ConfigError, match="or a size such as 300MiB"):
        checkpointing_named(text)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", 1e39),
        ("save_steps", 0),
        ("keep_last", 0),
        ("keep_best", -1),
        ("warmup_steps", 101),
        ("steps", 0),
        ("learning_rate", float("inf")),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("gradient_accumulation", 0),
        ("max_grad_norm", 0.0),
        ("optimizer", "sgd"),
        ("checkpointing", "half"),
        ("seed", -1),
    ],
)
def test_wrong_value_is_named(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        TrainConfig(**{setting: value})
