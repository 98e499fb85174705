"""Tests of the progress lines of training."""

from __future__ import annotations

import pytest

from qlora_lite.training.progress import described, training_progress
from qlora_lite.training.run_checkpoints import StepMetrics


def step(number: int) -> StepMetrics:
    return StepMetrics(number, 1.25, 0.5, 1e-4, 100, 321.4, 3 << 30)


def test_a_step_in_words() -> None:
    assert described(step(1)) == "loss 1.2500  gradient 0.500  321 tokens/s  peak 3,072.0 MiB"


def test_lines_without_a_terminal_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for shown, lines in ((True, 11), (False, 0)):
        with training_progress(100, shown) as show:
            for number in range(1, 101):
                show(step(number))
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == lines
