"""The figures of a training run: those told at its end, and those on the model card of its adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_lite.cli.training.task_records import Scores, scores_in_figures

if TYPE_CHECKING:
    from torch import nn

    from qlora_lite.cli.data_options import TrainingData
    from qlora_lite.data.tasks.labels import Labels
    from qlora_lite.planning.memory_budget import BudgetedConfig
    from qlora_lite.training.loop import TrainResult

LARGEST_EXPONENT = 700.0  # of a perplexity that is a finite float


def note_held_out(model: nn.Module, result: TrainResult, scores: Sequence[Scores], output: Path) -> None:
    """Writes the loss of the held-out examples, before and after the run, to the model card of the adapter."""
    from qlora_lite.lora.peft.card import update_adapter_card
    from qlora_lite.training.run_checkpoints import ADAPTER_FOLDER
    from qlora_lite.training.run_state import training_record

    if scores:
        before, after = (own["loss"] or 0.0 for own in scores)
        update_adapter_card(model, output / ADAPTER_FOLDER, training_record(result.steps, (before, after)))


def figures(
    result: TrainResult,
    data: TrainingData,
    labels: Labels | None,
    scores: list[Scores],
    budgeted: BudgetedConfig | None,
    output: Path,
) -> dict[str, object]:
    """The figures of a run. scores: of the held-out examples, before and after it."""
    predicted = {} if budgeted is None else {"predicted_peak_bytes": budgeted.predicted_peak}
    of_held_out: dict[str, object] = {}
    if data.held_out is not None:
        of_held_out["examples_held_out"] = len(data.held_out)
        of_held_out |= scores_in_figures(scores)
        if labels is None:
            losses = {when: own["loss"] or 0.0 for when, own in zip(("before", "after"), scores, strict=True)}
            of_held_out |= {
                f"perplexity_{when}": math.exp(min(loss, LARGEST_EXPONENT)) for when, loss in losses.items()
            }
    return {
        "examples": len(data.examples),
        "examples_shortened": data.tokenized.truncated,
        "examples_dropped": data.tokenized.dropped,
        "conversations_split": data.tokenized.split,
        "bad_records_skipped": data.tokenized.skipped,
        **of_held_out,
        "first_loss": result.losses[0],
        "last_loss": result.losses[-1],
        "seconds": round(result.seconds, 1),
        "peak_bytes": result.steps[-1].peak_bytes,
        **predicted,
        "logits_reason": result.logits_reason,
        "batches_halved_from_step": result.halved_at,
        "adapter": str(output / "adapter"),
    }
