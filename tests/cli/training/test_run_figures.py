"""Tests of the figures of a run: of held-out examples before and after, and of the best."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qlora_lite import TrainConfig
from qlora_lite.cli.training.run_figures import figures
from qlora_lite.training.loop import TrainResult
from qlora_lite.training.metrics import Evaluation, StepMetrics


def test_figures_of_held_out_examples_are_those_before_and_after() -> None:
    steps = [StepMetrics(n, 3.0 - n, 0.5, 1e-4, 10, 1.0, 7) for n in (1, 2)]
    held_out = tuple(Evaluation(n, 9.0 - n, {"f1": n / 2}, 0.1) for n in (0, 1, 2))
    tokenized = SimpleNamespace(truncated=1, dropped=2, split=3, skipped=4)
    data: Any = SimpleNamespace(examples=[1, 2, 3], held_out=[1], tokenized=tokenized)
    found = figures(TrainResult(steps, 1.23, None, evaluations=held_out), data, TrainConfig(), None, Path("out"))
    assert found["first_loss"] == 2.0 and found["last_loss"] == 1.0 and found["adapter"] == str(Path("out") / "adapter")
    assert found["examples"] == 3 and found["examples_held_out"] == 1
    named = {name: value for name, value in found.items() if name.endswith(("_before", "_after"))}
    assert named == {"held_out_loss_before": 9.0, "f1_before": 0.0, "held_out_loss_after": 7.0, "f1_after": 1.0}
    assert "predicted_peak_bytes" not in found and "best_step" not in found
    cut = TrainResult(steps, 1.23, None, evaluations=held_out[1:2], stopped_early=True)
    found = figures(cut, data, TrainConfig(eval_steps=1), None, Path("out"))
    assert (found["best_step"], found["best_held_out_loss"], found["stopped_early"]) == (1, 8.0, True)
    assert found["best_adapter"] == str(Path("out") / "best_adapter") and "f1_after" not in found
