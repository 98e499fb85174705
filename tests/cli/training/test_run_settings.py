"""Tests of the settings that the options of `train` become."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from qlora_lite import LoraConfig, TrainConfig
from qlora_lite.cli import train as module
from qlora_lite.cli.main import app
from qlora_lite.cli.training.run_settings import train_config
from qlora_lite.errors import ConfigError


class Parsed(Exception):
    pass


def parsed_run(monkeypatch: pytest.MonkeyPatch, *words: str) -> TrainConfig:
    """The settings of the run that `train` makes of its options."""
    made: list[TrainConfig] = []

    def keep(ctx: typer.Context) -> None:
        made.append(train_config(ctx))
        raise Parsed

    monkeypatch.setattr(module, "train_config", keep)
    with pytest.raises(Parsed):
        app(["train", "--model", "m", "--data", "d", "--output", "o", *words], standalone_mode=False)
    return made[0]


def test_without_options_a_run_has_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed_run(monkeypatch) == TrainConfig()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--steps 7 --schedule linear --warmup-ratio 0.5", {"steps": 7, "schedule": "linear", "warmup_ratio": 0.5}),
        ("--max-grad-norm none --keep-last all", {"max_grad_norm": None, "keep_last": None}),
        ("--max-grad-norm 0.3 --keep-last 4", {"max_grad_norm": 0.3, "keep_last": 4}),
        ("--weight-decay 0.1 --neftune-noise-alpha 5", {"weight_decay": 0.1, "neftune_noise_alpha": 5.0}),
        ("--min-learning-rate 1e-5 --checkpointing 1KiB", {"min_learning_rate": 1e-5, "checkpointing": 1024}),
    ],
)
def test_options_of_a_run_become_its_settings(
    monkeypatch: pytest.MonkeyPatch, words: str, wanted: dict[str, Any]
) -> None:
    assert parsed_run(monkeypatch, *words.split()) == TrainConfig(**wanted)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--max-grad-norm None", "--max-grad-norm must be a number, or none; got 'None'"),
        ("--keep-last 1.5", "--keep-last must be a number, or all; got '1.5'"),
        ("--epochs -1", "epochs must be a finite number above 0; got -1"),
        ("--epochs 1 --steps 1", "--steps and --epochs cannot be given together"),
        ("--best-by exact_match", "best_by chooses among evaluations; give eval_steps too; got 'exact_match'"),
        ("--schedule step", "schedule must be one of cosine, linear, constant; got 'step'"),
    ],
)
def test_wrong_options_of_a_run_are_refused(monkeypatch: pytest.MonkeyPatch, words: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parsed_run(monkeypatch, *words.split())


def test_options_become_the_settings_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LoraConfig] = []

    def keep(lora: LoraConfig, *rest: object) -> None:
        made.append(lora)
        raise Parsed

    monkeypatch.setattr(module, "check_options", keep)

    def parsed(*words: str) -> LoraConfig:
        with pytest.raises(Parsed):
            app(["train", "--model", "m", "--data", "d", "--output", "o", *words], standalone_mode=False)
        return made[-1]

    assert parsed() == LoraConfig(modules_to_save=[], trainable_token_indices=[])
    lora = parsed("--target-modules", "q_proj, v_proj", "--exclude-modules", "layers.0.q_proj", "--rank", "3")
    assert lora.target_modules == ["q_proj", "v_proj"] and lora.exclude_modules == ["layers.0.q_proj"]
    assert lora.rank == 3 and lora.alpha == 32 and not lora.use_rslora
    lora = parsed("--target-modules", r"re:.*\.[qv]_proj", "--exclude-modules", "vision_tower,layers.0")
    assert lora.target_modules == r".*\.[qv]_proj" and lora.exclude_modules == ["vision_tower", "layers.0"]
    lora = parsed("--layers-to-transform", "0-2,5", "--use-rslora", "--bias", "all", "--trainable-token-indices", "7,9")
    assert list(lora.layers_to_transform or ()) == [0, 1, 2, 5] and list(lora.trainable_token_indices) == [7, 9]
    assert lora.use_rslora and lora.bias == "all" and lora.target_modules == "all-linear"
    with pytest.raises(ConfigError, match="layers"):
        parsed("--layers-to-transform", "first")
