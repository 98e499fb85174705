"""Tests of the figures of a run: before and after, perplexities, and the model card."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_lite.cli.training.run_figures import figures
from qlora_lite.training.loop import TrainResult
from qlora_lite.training.run_checkpoints import StepMetrics


def test_figures_of_held_out_examples_are_those_before_and_after() -> None:
    steps = [StepMetrics(n, 3.0 - n, 0.5, 1e-4, 10, 1.0, 7) for n in (1, 2)]
    tokenized = SimpleNamespace(truncated=1, dropped=2, split=3, skipped=4)
    data: Any = SimpleNamespace(examples=[1, 2, 3], held_out=[1], tokenized=tokenized)
    found = figures(TrainResult(steps, 1.23, None), data, None, [{"loss": 2.0}, {"loss": 1.0}], None, Path("out"))
    assert found["first_loss"] == 2.0 and found["last_loss"] == 1.0 and found["adapter"] == str(Path("out") / "adapter")
    assert found["examples"] == 3 and found["examples_held_out"] == 1
    assert found["held_out_loss_before"] == 2.0 and found["perplexity_after"] == pytest.approx(2.718281828)
    assert "predicted_peak_bytes" not in found
