"""What a run decided in its first steps and keeps for the later ones: part of its state.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from qlora_lite.checkpoints.files import excerpt
from qlora_lite.choices import DEFAULTS, Choices, unknown_choices
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.training.objective.losses import LOGIT_FREE, LOSSES
from qlora_lite.training.objective.task_losses import TASK_LOSSES

SHOWN = 4
NONE, ABSENT = type(None), type(...)
# The shape of `DecisionsJson`, as of a value in run_checkpoints.py. Runs from before `loss` or `choices` lack them.
DECISIONS_SHAPE = {
    "loss": (str, NONE, ABSENT),
    "own_loss_because": (str, NONE),
    "dial": ([int] * 5, NONE),
    "halved_at": (int, NONE),
    "choices": (dict, NONE, ABSENT),
}


class DecisionsJson(TypedDict):
    """`Decisions` in state.json."""

    loss: str | None
    own_loss_because: str | None
    dial: list[int] | None
    halved_at: int | None
    choices: dict[str, str] | None


@dataclass(frozen=True)
class Decisions:
    """What a run decided in earlier steps and keeps for the later ones.

    loss: the name of the loss (training/objective/choice.py); None if it is not chosen yet.
    logits_reason: why the logits of all tokens are computed; None if the loss is computed without them.
    block_costs: the measured costs of blocks (`BlockCheckpointing.costs`).
    halved_at: the step in which memory ran out, from which on batches are computed in halves.
    choices: the alternatives of equal computations (choices.py); None before the first step.
    """

    loss: str | None = None
    logits_reason: str | None = None
    block_costs: list[int] | None = None
    halved_at: int | None = None
    choices: Choices | None = None

    def to_json(self) -> DecisionsJson:
        """Returns the decisions under their keys in state.json."""
        reason, costs = self.logits_reason, self.block_costs
        choices = None if self.choices is None else dict(self.choices)
        return {
            "loss": self.loss,
            "own_loss_because": reason,
            "dial": costs,
            "halved_at": self.halved_at,
            "choices": choices,
        }

    @classmethod
    def from_json(cls, plain: DecisionsJson) -> Decisions:
        """Returns the decisions that `to_json` was called on.

        A run from before `loss` was noted chooses again if it took the loss of the model itself. One from before
        `choices` were noted, or a key of them, took the defaults. Raises CheckpointError for what is not known.
        """
        reason = plain["own_loss_because"]
        loss = plain.get("loss") or (LOGIT_FREE if reason is None else None)
        known = [*LOSSES, *TASK_LOSSES]
        if loss is not None and loss not in known:
            raise CheckpointError(f"state.json has an unknown loss, {excerpt(loss)}; known are: {', '.join(known)}")
        return cls(loss, reason, plain["dial"], plain["halved_at"], _choices(plain))


def _choices(plain: DecisionsJson) -> Choices | None:
    stored = plain.get("choices", {})
    if stored is None:
        return None
    if problems := unknown_choices(stored):
        raise CheckpointError(f"state.json has unknown choices: {listing(map(excerpt, problems), SHOWN)}")
    return {**DEFAULTS, **stored}
