"""The lines of metrics.jsonl: one for each step, and one for each evaluation on held-out batches.

    {"step": 0, "held_out_loss": 2.31, "perplexity": 10.1, "seconds": 3.2}
    {"step": 1, "loss": 2.4, "gradient_norm": 0.7, ...}

An evaluation has the number of the last step before it, and its line follows the line of that step.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from qlora_lite.checks import is_count, is_finite
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.memory.report import readable_bytes
from qlora_lite.training.config import EXACT_MATCH, LOSS

HELD_OUT_LOSS = "held_out_loss"
# What the line of an evaluation has besides its scores.
OWN_KEYS = ("step", HELD_OUT_LOSS, "seconds")


@dataclass(frozen=True)
class StepMetrics:
    """The figures of one optimizer step: one line of metrics.jsonl.

    loss: the mean over the labelled tokens of the step. gradient_norm: before clipping. learning_rate: of A, where
    other parameters have another one. tokens: padding included. peak_bytes: None where it is not known.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    peak_bytes: int | None

    @classmethod
    def read(cls, line: dict[str, int | float | None]) -> StepMetrics:
        """Returns the metrics of a parsed line. Raises CheckpointError if its keys are others."""
        if unexpected := line.keys() ^ {field.name for field in fields(cls)}:
            raise CheckpointError(
                f"metrics.jsonl has a line with missing or unknown keys: {', '.join(sorted(unexpected))}"
            )
        return cls(**line)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Evaluation:
    """The figures of the held-out batches after a step: one line of metrics.jsonl.

    step: 0 before the first one. held_out_loss: the mean over all labelled tokens. scores: the perplexity of a causal
    language model, the scores of another task, and what the user's `evaluate` returned. seconds: that it took.
    """

    step: int
    held_out_loss: float
    scores: Mapping[str, float | None]
    seconds: float

    def to_line(self) -> dict[str, object]:
        """Returns the line, as plain data."""
        return {"step": self.step, HELD_OUT_LOSS: self.held_out_loss, **self.scores, "seconds": self.seconds}

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Evaluation:
        """Returns the evaluation of a parsed line. Raises CheckpointError if a value is not a number."""
        wrong = {name for name, value in line.items() if value is not None and not is_finite(value)}
        wrong |= {name for name in OWN_KEYS if line.get(name) is None}
        wrong |= set() if is_count(line.get("step"), 0) else {"step"}
        if wrong:
            raise CheckpointError(f"metrics.jsonl has an evaluation without numbers: {listing(sorted(wrong), 4)}")
        scores = {name: value for name, value in line.items() if name not in OWN_KEYS}
        return cls(line["step"], line[HELD_OUT_LOSS], scores, line["seconds"])


def is_evaluation(line: object) -> bool:
    """Whether a parsed line is of an evaluation."""
    return isinstance(line, dict) and HELD_OUT_LOSS in line


def line_of(metrics: StepMetrics | Evaluation) -> str:
    """Returns a line of metrics.jsonl, with its end."""
    plain = metrics.to_line() if isinstance(metrics, Evaluation) else asdict(metrics)
    return json.dumps(plain) + "\n"


def lines_of(steps: Sequence[StepMetrics], evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """Yields the lines of a run in their order."""
    after = {evaluation.step: evaluation for evaluation in evaluations}
    if 0 in after:
        yield line_of(after[0])
    for step in steps:
        yield line_of(step)
        if step.step in after:
            yield line_of(after[step.step])


def rank(held_out_loss: float, exact_match: float | None, by: str) -> tuple[float, float]:
    """Returns what evaluations are compared by: that of the better one is smaller. by: `best_by` of TrainConfig."""
    if by != EXACT_MATCH:
        return 0.0, held_out_loss
    return math.inf if exact_match is None else -exact_match, held_out_loss


def best_evaluation(evaluations: Sequence[Evaluation], by: str = LOSS) -> Evaluation | None:
    """Returns the first of the best evaluations, without the one before the first step.

    by: `loss` (the lowest held-out loss) or `exact_match` (the highest score of this name, then the lowest loss).
    """
    trained = [evaluation for evaluation in evaluations if evaluation.step > 0]
    return min(trained, key=lambda one: rank(one.held_out_loss, one.scores.get(EXACT_MATCH), by), default=None)


def is_out_of_patience(evaluations: Sequence[Evaluation], patience: int | None, by: str = LOSS) -> bool:
    """Whether the last `patience` evaluations were not better than the best one; never with None."""
    best = best_evaluation(evaluations, by)
    if patience is None or best is None:
        return False
    return sum(evaluation.step > best.step for evaluation in evaluations) >= patience


def described(step: StepMetrics) -> str:
    """Returns loss, gradient norm, speed and peak memory of a step as one line."""
    peak = "" if step.peak_bytes is None else f"  peak {readable_bytes(step.peak_bytes)}"
    return f"loss {step.loss:.4f}  gradient {step.gradient_norm:.3f}  {step.tokens_per_second:.0f} tokens/s{peak}"


def described_evaluation(evaluation: Evaluation, steps: int) -> str:
    """Returns step, held-out loss and scores as one line. steps: of the run."""
    shown = {name.replace("_", " "): value for name, value in evaluation.scores.items() if value is not None}
    scores = "".join(f"  {name} {value:.4g}" for name, value in shown.items())
    return f"step {evaluation.step}/{steps}  held-out loss {evaluation.held_out_loss:.4f}{scores}"


def perplexity(loss: float) -> float:
    """Returns exp(loss), or the largest float where that is too large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return sys.float_info.max
