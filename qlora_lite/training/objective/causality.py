"""Whether a model predicts each token from earlier ones alone, as a causal language model does."""

from __future__ import annotations

import json
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qlora_lite.data.batching import Batch
from qlora_lite.errors import ConfigError
from qlora_lite.training.objective.made_up_rows import (
    MadeUpRows,
    length_within,
    states_of,
    undisturbed,
    was_rehearsed,
)
from qlora_lite.training.objective.task_losses import task_loss

# Tokens before and after the change. The first number is a multiple of few sizes of blocks, within which a model that
# is causal from block to block may see all tokens.
MADE_UP_LENGTHS = (11, 12)
# Entries of transformers' configs by which a model becomes causal.
CAUSAL_SETTINGS = {"attn_type": "uni", "causal": True, "is_decoder": True}

_rehearsed: WeakSet[nn.Module] = WeakSet()


def _attends_by_hashes(model: nn.Module) -> bool:
    """Whether this is a Reformer, in which all tokens decide on the buckets within which its masked attention looks."""
    config = getattr(model, "config", None)
    return "lsh" in (getattr(config, "attn_layers", None) or ()) and bool(getattr(config, "is_decoder", False))


def _remedy(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    for name, value in CAUSAL_SETTINGS.items():
        if (has := getattr(config, name, None)) is not None and has != value:
            return f"set {name} to {json.dumps(value)} in its config.json, or train a causal language model"
    return "train a causal language model"


@torch.no_grad()
def check_causality(model: nn.Module, batch: Batch) -> None:
    """Raises ConfigError if a model lets tokens see later ones, so that it would learn to copy what it predicts.

    This is tried on two made-up rows, whatever the batch holds. The hidden states of their first tokens must not change
    with the tokens that follow, except by rounding: if they change with those of another row, they may change by a few
    times as much. The model and the random states are afterwards as before. Tasks that predict no next token may see
    all of them, and nothing is tried.
    """
    if task_loss(model, batch) is not None:
        return
    is_fake = isinstance(batch["input_ids"], FakeTensor)
    if _attends_by_hashes(model) or (is_fake and was_rehearsed(model, _rehearsed)):
        return
    made_up = MadeUpRows(model, batch)
    before, after = length_within(model, MADE_UP_LENGTHS)
    tokens = made_up.tokens(2, before + after)
    others = torch.cat([tokens[:, :before], made_up.tokens(2, before + after, 1)[:, before:]], dim=1)

    def states(tokens: Tensor) -> Tensor:
        with undisturbed(model):
            return states_of(model, {"input_ids": tokens})[:, :before]

    expected, found = states(tokens), states(others)
    # The loss of a model that computes NaN is refused in the first step.
    if is_fake or not (expected.isfinite().all() and found.isfinite().all()):
        return
    seen = made_up.change(found, expected, before + after, states)
    if seen is None:
        return
    raise ConfigError(
        f"a {type(model).__name__} lets tokens see later ones: other tokens from place {before + 1} on changed the "
        f"hidden states of the {before} tokens before by up to {seen:.1g} of their norm; trained like "
        f"this, it would learn to copy what it should predict: {_remedy(model)}"
    )
