"""Tests of training rehearsed from a config against real training, to the byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite.errors import CheckpointError, ConfigError, TargetError
from qlora_lite.lora.config import LoraConfig
from qlora_lite.memory.breakdown import Category
from qlora_lite.planning.cuda_workspaces import CUBLAS_WORKSPACE
from qlora_lite.planning.rehearsal import rehearsal, rehearsed_report
from qlora_lite.planning.training_rehearsal import build_fake_model, read_config, rehearse_steps
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.training.config import TrainConfig
from qlora_lite.training.loop import profile_steps, train

NF4, TWO_STEPS = QuantConfig(), TrainConfig(steps=2)
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"format": "nf4", "embedding_format": "int8"}, {"checkpointing": "full"}),
    ({"format": "int8"}, {"checkpointing": "none", "optimizer": "adamw8bit"}),
    ({"format": "fp4", "double_quant": False}, {"checkpointing": 400_000, "gradient_accumulation": 2}),
    ({"format": "none"}, {"checkpointing": "full"}),
]


@pytest.mark.parametrize(("quant", "train"), CASES)
def test_training_takes_the_rehearsed_bytes(
    tiny_folder: Path, quant: dict[str, Any], train: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if quant["format"] == "int8":  # one of the cases with other kernels than the defaults
        other = "attention_forward=torch,attention_backward=torch,integer_products=fp32"
        monkeypatch.setenv("QLORA_LITE_CHOICES", f"default,{other}")
    settings = (QuantConfig(**quant), LoraConfig(rank=4), TrainConfig(steps=2, **train))
    before = rehearse_steps(tiny_folder, *settings, rows=2, tokens=24)
    after = profile_steps(tiny_folder, *settings, rows=2, tokens=24)
    assert [phase.name for phase in before.phases] == ["load", "forward", "backward", "optimizer"]
    for rehearsed, real in zip(before.phases, after.phases, strict=True):
        assert rehearsed.live_peak == real.live_peak, rehearsed.name
        assert rehearsed.peak_in == real.peak_in
        assert rehearsed.breakdown is not None and real.breakdown is not None
        assert rehearsed.breakdown.by_category() == real.breakdown.by_category()
        assert rehearsed.entries == real.entries


def test_the_settings_of_a_whole_run_are_rehearsed_by_its_first_steps(tiny_folder: Path) -> None:
    whole = TrainConfig(steps=10_000, warmup_steps=100, eval_steps=50, save_steps=100, patience=2, keep_best=1)
    settings, shape = (NF4, LoraConfig(rank=4)), {"rows": 2, "tokens": 24}
    rehearsed = rehearse_steps(tiny_folder, *settings, whole, **shape)
    assert rehearsed == rehearse_steps(tiny_folder, *settings, TrainConfig(steps=3), **shape)
    two = rehearse_steps(tiny_folder, *settings, TWO_STEPS, **shape)
    assert [phase.live_peak for phase in rehearsed.phases] == [phase.live_peak for phase in two.phases]
    few = TrainConfig(steps=2, eval_steps=1, patience=1)
    real = profile_steps(tiny_folder, *settings, few, **shape)
    assert [phase.live_peak for phase in rehearsed.phases] == [phase.live_peak for phase in real.phases]


ALSO_TRAINED: list[dict[str, Any]] = [
    {"modules_to_save": ["lm_head", "norm"]},
    {"trainable_token_indices": [3, 8], "modules_to_save": ["up_proj"]},
]


@pytest.mark.parametrize("also_trained", ALSO_TRAINED)
def test_parameters_trained_besides_a_and_b_are_rehearsed_too(tiny_folder: Path, also_trained: dict[str, Any]) -> None:
    lora = LoraConfig(rank=4, target_modules=["q_proj"], **also_trained)
    settings = (QuantConfig(embedding_format="int8"), lora, TWO_STEPS)
    before = rehearse_steps(tiny_folder, *settings, rows=2, tokens=24)
    after = profile_steps(tiny_folder, *settings, rows=2, tokens=24)
    for rehearsed, real in zip(before.phases, after.phases, strict=True):
        assert rehearsed.breakdown is not None and real.breakdown is not None
        assert rehearsed.breakdown.by_category() == real.breakdown.by_category(), rehearsed.name
    rehearse_steps(tiny_folder, *settings, rows=2, tokens=24, accelerator=True)


def test_a_config_is_enough(tiny_folder: Path, tmp_path: Path) -> None:
    config = shutil.copyfile(tiny_folder / "config.json", tmp_path / "some.json")
    alone = rehearse_steps(config, NF4, LoraConfig(rank=4), TWO_STEPS, rows=1, tokens=8)
    assert alone == rehearse_steps(tiny_folder, NF4, LoraConfig(rank=4), TWO_STEPS, rows=1, tokens=8)


def test_rows_longer_than_a_model_was_made_for_are_predicted_where_it_takes_them(tiny_folder: Path) -> None:
    one, longer = (
        rehearse_steps(tiny_folder, NF4, LoraConfig(rank=4), TWO_STEPS, rows=1, tokens=tokens).phase("backward")
        for tokens in (2048, 2058)
    )
    assert one and longer and (one.live_peak or 0) < (longer.live_peak or 0)


def test_on_an_accelerator_attention_keeps_its_output_and_libraries_their_workspaces(tiny_folder: Path) -> None:
    settings = (NF4, LoraConfig(rank=4), TrainConfig(steps=2, checkpointing="none"))
    phases = [
        rehearse_steps(tiny_folder, *settings, rows=1, tokens=64, accelerator=accelerator).phase("backward")
        for accelerator in (False, True)
    ]
    on_host, on_device = (phase.breakdown.by_category() for phase in phases if phase and phase.breakdown)
    # Besides the workspaces there is a table of 256 fp32 values that bitsandbytes keeps.
    assert on_device[Category.OTHER] == 2 * CUBLAS_WORKSPACE + 256 * 4
    # No scores of 64 x 64 for each of two layers and four heads, but a log-sum-exp for each row.
    assert on_device[Category.ACTIVATION] - on_host[Category.ACTIVATION] < 2 * 4 * 64 * 64 * 2


def test_settings_that_training_refuses_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    shape = {"rows": 1, "tokens": 8}
    with pytest.raises(TargetError, match="q_porj"):
        rehearse_steps(tiny_folder, NF4, LoraConfig(target_modules=["q_porj"]), TWO_STEPS, **shape)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "gpt2", "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}))
    with pytest.raises(ConfigError, match="examples of 65 tokens do not fit into a GPT2LMHeadModel, which has 64"):
        rehearse_steps(config, NF4, LoraConfig(), TWO_STEPS, rows=1, tokens=65)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"weights\.bin is not a config; name a config\.json"):
        read_config(tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_config(tmp_path / "nothing" / "here")


def test_evaluations_fit_where_steps_do_on_an_accelerator(tiny_folder: Path) -> None:
    """Held-out batches of the shape of those trained on: what is predicted for steps is enough for evaluations."""
    with rehearsal(accelerator=True) as profiler:
        model = build_fake_model(read_config(tiny_folder), NF4, LoraConfig(rank=4), profiler)
        ids = torch.zeros(2, 64, dtype=torch.int64)
        rows = [{"input_ids": ids, "labels": ids}]
        train(model, rows, TrainConfig(steps=2, eval_steps=1), eval_batches=rows, profiler=profiler, progress=False)
    peaks = {phase.name: phase for phase in rehearsed_report(profiler, accelerator=True).phases}
    assert peaks["evaluation"].entries == 3
    for peak in ("live_peak", "allocated_peak"):
        assert 0 < getattr(peaks["evaluation"], peak) < getattr(peaks["forward"], peak)
