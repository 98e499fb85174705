"""Tests of the lines of metrics.jsonl: of steps and of evaluations, and what follows from these."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_lite.errors import CheckpointError
from qlora_lite.training.metrics import (
    Evaluation,
    StepMetrics,
    best_evaluation,
    described,
    described_evaluation,
    is_evaluation,
    is_out_of_patience,
    line_of,
    lines_of,
    perplexity,
)


def step(number: int) -> StepMetrics:
    return StepMetrics(number, 1.25, 0.5, 1e-4, 100, 321.4, None)


def evaluations(*losses: float) -> list[Evaluation]:
    """The first one is before the first step."""
    return [Evaluation(2 * number, loss, {"perplexity": 2.0}, 0.5) for number, loss in enumerate(losses)]


def test_lines_come_in_the_order_of_a_run_and_are_read_again() -> None:
    steps, held_out = [step(n) for n in (1, 2, 3, 4)], evaluations(3.0, 2.0, 1.0)
    lines = [json.loads(line) for line in lines_of(steps, held_out)]
    assert [(line["step"], is_evaluation(line)) for line in lines] == [
        *((0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)),
    ]
    assert [Evaluation.read(line) for line in lines if is_evaluation(line)] == held_out
    assert [StepMetrics.read(line) for line in lines if not is_evaluation(line)] == steps
    assert line_of(held_out[0]) == '{"step": 0, "held_out_loss": 3.0, "perplexity": 2.0, "seconds": 0.5}\n'


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"held_out_loss": None}, "held_out_loss"),
        ({"held_out_loss": float("nan")}, "held_out_loss"),
        ({"perplexity": "x"}, "perplexity"),
        ({"step": 1.5}, "step"),
        ({"step": True, "seconds": []}, "seconds, step"),
    ],
)
def test_a_line_without_numbers_is_refused(change: dict[str, Any], wrong: str) -> None:
    with pytest.raises(CheckpointError, match=f"metrics.jsonl has an evaluation without numbers: {wrong}$"):
        Evaluation.read({**evaluations(1.0)[0].to_line(), **change})


@pytest.mark.parametrize(
    ("losses", "best", "waited"),
    [
        ((1.0,), None, 0),
        ((0.5, 3.0), 2, 0),
        ((9.0, 3.0, 2.0, 2.0, 2.5), 4, 2),
        ((9.0, 1.0, 2.0, 3.0, 0.5), 8, 0),
    ],
)
def test_the_best_is_the_first_of_the_lowest_and_patience_counts_from_it(
    losses: tuple[float, ...], best: int | None, waited: int
) -> None:
    found = best_evaluation(evaluations(*losses))
    assert (None if found is None else found.step) == best
    assert not is_out_of_patience(evaluations(*losses), None) and not is_out_of_patience(
        evaluations(*losses), waited + 1
    )
    assert is_out_of_patience(evaluations(*losses), waited) == (best is not None) or waited == 0


def test_by_exact_match_the_best_has_the_highest_one_and_of_those_the_lowest_loss() -> None:
    found = [
        Evaluation(number, loss, {} if score is None else {"exact_match": score}, 1.0)
        for number, (loss, score) in enumerate(
            [(1.0, 1.0), (3.0, 0.25), (2.0, 0.5), (1.5, 0.5), (1.0, None), (0.5, 0.25)]
        )
    ]
    best = best_evaluation(found, "exact_match")
    assert best is found[3] and best_evaluation(found) is found[5]
    assert is_out_of_patience(found, 2, "exact_match") and not is_out_of_patience(found, 3, "exact_match")
    assert not is_out_of_patience(found, 1)


def test_a_perplexity_is_finite() -> None:
    assert perplexity(0.0) == 1.0 and 1e308 < perplexity(1e6) < float("inf")


def test_steps_and_evaluations_in_words() -> None:
    step = StepMetrics(7, 1.25, 0.5, 1e-4, 100, 321.4, 3 << 30)
    assert described(step) == "loss 1.2500  gradient 0.500  321 tokens/s  peak 3,072.0 MiB"
    evaluation = Evaluation(7, 0.5, {"exact_match": 0.25, "f1": None}, 1.0)
    assert described_evaluation(evaluation, 100) == "step 7/100  held-out loss 0.5000  exact match 0.25"
