"""Tests of the progress lines of training."""

from __future__ import annotations

import pytest

from qlora_lite.training.metrics import Evaluation, StepMetrics
from qlora_lite.training.progress import described, described_evaluation, training_progress


def step(number: int) -> StepMetrics:
    return StepMetrics(number, 1.25, 0.5, 1e-4, 100, 321.4, 3 << 30)


def test_a_step_in_words() -> None:
    assert described(step(1)) == "loss 1.2500  gradient 0.500  321 tokens/s  peak 3,072.0 MiB"


def test_lines_without_a_terminal_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for shown, lines in ((True, 12), (False, 0)):
        with training_progress(100, shown) as (show, note):
            for number in range(1, 101):
                show(step(number))
            note(described_evaluation(Evaluation(7, 0.5, {"exact_match": 0.25, "f1": None}, 1.0), 100))
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == lines
        assert captured.err.endswith("step 7/100  held-out loss 0.5000  exact match 0.25\n") or not shown
