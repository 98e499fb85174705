"""The figures of a training run that are told at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_lite.cli.data_options import TrainingData
    from qlora_lite.planning.memory_budget import BudgetedConfig
    from qlora_lite.training.config import TrainConfig
    from qlora_lite.training.loop import TrainResult


def figures(
    result: TrainResult, data: TrainingData, config: TrainConfig, budgeted: BudgetedConfig | None, output: Path
) -> dict[str, object]:
    """The figures of a run, in the order in which they are told."""
    predicted = {} if budgeted is None else {"predicted_peak_bytes": budgeted.predicted_peak}
    return {
        "examples": len(data.examples),
        "examples_shortened": data.tokenized.truncated,
        "examples_dropped": data.tokenized.dropped,
        "conversations_split": data.tokenized.split,
        "bad_records_skipped": data.tokenized.skipped,
        **({} if data.held_out is None else _of_held_out(result, len(data.held_out))),
        **({} if config.eval_steps is None else _of_best(result, output)),
        "first_loss": result.losses[0],
        "last_loss": result.losses[-1],
        "seconds": round(result.seconds, 1),
        "peak_bytes": result.steps[-1].peak_bytes,
        **predicted,
        "logits_reason": result.logits_reason,
        "batches_halved_from_step": result.halved_at,
        "adapter": str(output / "adapter"),
    }


def _of_held_out(result: TrainResult, examples: int) -> dict[str, object]:
    """Loss and scores of held-out examples before the first step and after the last one: `perplexity_after`."""
    found: dict[str, object] = {"examples_held_out": examples}
    for when, step in (("before", 0), ("after", len(result.steps))):
        evaluation = next((evaluation for evaluation in result.evaluations if evaluation.step == step), None)
        if evaluation is not None:
            scores = {"held_out_loss": evaluation.held_out_loss, **evaluation.scores}
            found |= {f"{name}_{when}": score for name, score in scores.items()}
    return found


def _of_best(result: TrainResult, output: Path) -> dict[str, object]:
    from qlora_lite.training.config import LOSS
    from qlora_lite.training.run_checkpoints import BEST_FOLDER

    assert result.best is not None
    return {
        "best_step": result.best.step,
        "best_held_out_loss": result.best.held_out_loss,
        **({} if result.best_by == LOSS else {f"best_{result.best_by}": result.best.scores[result.best_by]}),
        "best_adapter": str(output / BEST_FOLDER),
        "stopped_early": result.stopped_early,
    }
