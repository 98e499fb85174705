"""Tests of TrainConfig: wrong settings, and `checkpointing` as a word or a number of bytes."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_lite.errors import ConfigError
from qlora_lite.training.config import TrainConfig, checkpointing_named, steps_of_epochs


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
        ("eval_steps", 0),
        ("patience", 0),
        ("best_by", "f1"),
        ("warmup_steps", 101),
        ("schedule", "step"),
        ("warmup_ratio", 1.5),
        ("warmup_ratio", float("nan")),
        ("min_learning_rate", 1e-3),
        ("min_learning_rate", -1e-9),
        ("neftune_noise_alpha", 0),
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


def test_a_warmup_is_set_once_and_a_constant_rate_has_no_minimum() -> None:
    with pytest.raises(ConfigError, match="warmup_steps and warmup_ratio both set the warm-up"):
        TrainConfig(warmup_steps=1, warmup_ratio=0.1)
    with pytest.raises(ConfigError, match="a constant schedule has no min_learning_rate"):
        TrainConfig(schedule="constant", min_learning_rate=1e-5)


@pytest.mark.parametrize(("share", "steps", "wanted"), [(0.03, 100, 3), (0.03, 101, 4), (0.0, 10, 0), (1, 7, 7)])
def test_a_share_of_the_steps_is_rounded_up_as_transformers_does(share: float, steps: int, wanted: int) -> None:
    from transformers import TrainingArguments

    assert TrainConfig(steps=steps, warmup_ratio=share).steps_of_warmup == wanted
    if 0 < share < 1:
        assert TrainingArguments(warmup_steps=share, use_cpu=True).get_warmup_steps(steps) == wanted


@pytest.mark.parametrize(
    ("epochs", "batches", "accumulation", "steps"), [(3, 47, 1, 141), (3, 47, 2, 71), (0.5, 47, 1, 24), (1e-9, 5, 4, 1)]
)
def test_epochs_are_steps_rounded_up(epochs: float, batches: int, accumulation: int, steps: int) -> None:
    assert steps_of_epochs(epochs, batches, accumulation) == steps


@pytest.mark.parametrize("epochs", [0, -1, float("nan"), float("inf"), 1e30, True])
def test_what_is_not_a_number_of_epochs_is_refused(epochs: float) -> None:
    with pytest.raises(ConfigError, match="epochs must"):
        steps_of_epochs(epochs, 10)


def test_evaluations_that_decide_must_be_made() -> None:
    with pytest.raises(ConfigError, match="patience counts evaluations; give eval_steps too; got 2"):
        TrainConfig(patience=2)
    with pytest.raises(ConfigError, match="save_steps must be a multiple of eval_steps, 4; got 6"):
        TrainConfig(keep_best=1, eval_steps=4, save_steps=6)
    TrainConfig(keep_best=1, eval_steps=4, save_steps=8, patience=1)
    with pytest.raises(ConfigError, match="best_by chooses among evaluations; give eval_steps too; got 'exact_match'"):
        TrainConfig(best_by="exact_match")
    assert TrainConfig(best_by="exact_match", eval_steps=1).steps_alone() == TrainConfig()
