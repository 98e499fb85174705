"""Whether a model has a position for each token of a row."""

from __future__ import annotations

from torch import nn

from qlora_lite.data.batching import Batch
from qlora_lite.errors import ConfigError
from qlora_lite.positions import longest_sequence, most_positions
from qlora_lite.tasks import SEQ2SEQ_LM, task_of


def check_length(model: nn.Module, tokens: int) -> None:
    """Raises ConfigError if a row of so many tokens has more than the model has positions in a table.

    Models with rotary, relative or recurrent positions have no table, and take longer rows than they were made for.
    """
    made_for = longest_sequence(getattr(model, "config", None))
    if made_for is None or 2 * tokens < made_for:  # spares a search in every module for each batch
        return
    most = most_positions(model)
    if most is not None and tokens > most:
        raise ConfigError(
            f"examples of {tokens} tokens do not fit into a {type(model).__name__}, which has {most} positions; cut "
            f"them to at most {most} tokens (max_length)"
        )


def check_positions(model: nn.Module, batch: Batch) -> None:
    """Raises ConfigError if the model lacks a position that a batch needs.

    Of a batch with position_ids these count, since packed rows may be longer than any of their examples.
    """
    positions = batch.get("position_ids")
    if positions is None:
        is_target = task_of(model) is SEQ2SEQ_LM
        texts = [
            value for name, value in batch.items() if name.endswith("input_ids") or (is_target and name == "labels")
        ]
        check_length(model, max(text.shape[1] for text in texts))
    elif positions.numel() > 0:
        check_length(model, int(positions.max()) + 1)
