"""Tests of real runs of transformers' Trainer: what their checkpoints hold, and what is restored from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qlora_lite import LoraConfig, add_lora_, load_adapter_, load_quantized
from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.integrations.transformers import AdapterTrainer
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.training.forward.fuse import fuse_, unfuse_

STEPS = 4
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "qlora_lite_base.json"}


class StopAt(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends training after a step, as a limit of time would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def adapted(folder: Path) -> Any:
    model = load_quantized(folder, dtype=torch.float32)
    torch.manual_seed(0)
    add_lora_(model, LoraConfig(rank=2, dropout=0.1))
    fuse_(model)
    return model


def trainer(model: Any, out: Path, stop: int = STEPS, **options: Any) -> AdapterTrainer:
    tokens = torch.randint(3, 60, (20, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row.clone()} for row in tokens]
    settings: dict[str, Any] = {"max_steps": STEPS, "save_steps": 2, "learning_rate": 1e-2, "report_to": []}
    settings |= {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2, "save_only_model": False}
    arguments = transformers.TrainingArguments(output_dir=str(out), **settings | options)
    return AdapterTrainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[StopAt(stop)])


def test_a_resumed_run_ends_with_the_same_bits(tiny_folder: Path, tmp_path: Path) -> None:
    whole = adapted(tiny_folder)
    trainer(whole, tmp_path / "whole").train()
    trainer(adapted(tiny_folder), tmp_path / "parts", stop=2).train()
    resumed = adapted(tiny_folder)
    trainer(resumed, tmp_path / "parts").train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    expected, found = adapter_parameters(whole), adapter_parameters(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_checkpoints_have_adapters_only(tiny_folder: Path, tmp_path: Path) -> None:
    model = adapted(tiny_folder)
    run = trainer(model, tmp_path)
    run.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert {file.name for file in checkpoint.iterdir()} >= ADAPTER_FILES
    adapter = (checkpoint / "adapter_model.safetensors").stat().st_size
    assert not list(checkpoint.glob("model*")) and (checkpoint / "optimizer.pt").stat().st_size < 4 * adapter
    fresh = load_quantized(tiny_folder, dtype=torch.float32)
    load_adapter_(fresh, checkpoint)
    expected = adapter_parameters(model)
    assert all(torch.equal(value, expected[name]) for name, value in adapter_parameters(fresh).items())
    run.save_model(str(tmp_path))  # into a folder with other files
    assert checkpoint.is_dir() and {file.name for file in tmp_path.iterdir()} >= ADAPTER_FILES
    assert not list(tmp_path.glob(".adapter.*"))


def test_the_best_adapter_comes_back(tiny_folder: Path, tmp_path: Path) -> None:
    model = adapted(tiny_folder)
    options: dict[str, Any] = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(model, tmp_path, learning_rate=0.5, metric_for_best_model="eval_loss", **options)
    before = {name: id(value) for name, value in adapter_parameters(model).items()}
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best])
    assert {name: id(value) for name, value in adapter_parameters(model).items()} == before


def test_a_model_without_adapters_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder, dtype=torch.float32)
    with pytest.raises(TargetError, match="no adapters of add_lora_ or peft to save"):
        trainer(model, tmp_path).save_model(str(tmp_path / "out"))


def test_losses_with_settings_of_the_trainer_are_those_of_the_own_forward(tiny_folder: Path, tmp_path: Path) -> None:
    """Label smoothing, a loss function, and the count of items over accumulated batches are never ignored."""

    def z_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return outputs.logits.square().mean()

    for options in ({"label_smoothing_factor": 0.5}, {"gradient_accumulation_steps": 2}, {}):
        losses = []
        for fuse in (True, False):
            model = adapted(tiny_folder)
            if not fuse:
                unfuse_(model)
            run = trainer(model, tmp_path, stop=1, logging_steps=1, save_strategy="no", **options)
            if not options:
                run.compute_loss_func = z_loss
            run.train()
            logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
            losses.append([*logged, run.evaluate()["eval_loss"]])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2


def test_metrics_that_need_logits_ask_for_them(tiny_folder: Path, tmp_path: Path) -> None:
    model = adapted(tiny_folder)
    run = trainer(model, tmp_path)
    shapes: list[tuple[int, ...]] = []
    run.compute_metrics = lambda found: shapes.append(found.predictions.shape) or {}
    with pytest.raises(ConfigError, match="compute_metrics and predict need logits, and a fused model has none"):
        run.evaluate()
    unfuse_(model)
    fuse_(model, keep_logits=True)
    run.evaluate()
    assert shapes == [(4, 12, model.config.vocab_size)]
