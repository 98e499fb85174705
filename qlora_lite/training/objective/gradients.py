"""Whether every trained parameter gets a gradient, found out on a few made-up tokens before the first step."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from qlora_lite import architecture
from qlora_lite.compute.devices import is_out_of_memory
from qlora_lite.data.batching import Batch
from qlora_lite.errors import TrainingError, listing
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.targets import exclusions_for
from qlora_lite.surgery import is_below, tower_names
from qlora_lite.training.objective.losses import Loss
from qlora_lite.training.objective.made_up_rows import TEXT_INPUTS, MadeUpRows, length_within, undisturbed
from qlora_lite.training.objective.task_losses import OTHER_TEXTS, task_loss

MADE_UP_LENGTH = 16
SHOWN = 8


def _other_inputs(batch: Batch) -> set[str]:
    names = set(batch)
    for prefix in OTHER_TEXTS:
        names = {name.removeprefix(prefix) for name in names}
    return names - TEXT_INPUTS - {"token_type_ids"}


def _same_kind(name: str) -> str:
    """Returns a parameter's name without its numbers: `model.layers.3.q_proj.lora_A` and all others of its kind."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _sentence(model: nn.Module, trained: Collection[str], missing: Collection[str], when: str) -> str:
    """Returns which trained parameters get no gradient, and the settings that leave them out."""
    adapted = list(lora_layers(model))
    without = [name for name in adapted if any(lost.startswith(f"{name}.") for lost in missing)]
    lost_names = tuple(f"{name}." for name in without)
    others = [name for name in missing if not name.startswith(lost_names)]
    parts = []
    if without and len(without) == len(adapted):
        parts.append(
            f"none of the {len(adapted)} adapted layers gets a gradient {when}: the loss does not depend on them"
        )
    elif without:
        kept = [name for name in adapted if name not in without]
        found = exclusions_for(without, kept)
        counted = listing((f"{part} ({len(names)} layers)" for part, names in found.items()), SHOWN)
        parts.append(
            f"{len(without)} of {len(adapted)} adapted layers get no gradient {when}: {counted}; the model does not "
            f"use them here, so leave them out with exclude_modules={list(found)} (--exclude-modules "
            f"{','.join(found)})"
        )
    if others:
        parts.append(
            f"{len(others)} of {len(trained)} trained parameters get no gradient {when}: {listing(others, SHOWN)}; "
            f"leave their modules out of modules_to_save and bias"
        )
    return "; ".join(parts)


def check_gradients(model: nn.Module, trained: Mapping[str, nn.Parameter], without_images: bool = False) -> None:
    """Raises TrainingError that lists the trained parameters without a gradient after the first step's backward.

    without_images: the step had text alone, and later ones have images, which reach the towers of the model too.
    """
    towers = tower_names(model) if without_images else []
    missing = [name for name, parameter in trained.items() if parameter.grad is None and not is_below(name, towers)]
    if missing:
        raise TrainingError(_sentence(model, trained, missing, "in the first step"))


def _unreached(model: nn.Module, trained: Mapping[str, nn.Parameter], loss: Loss, row: Batch) -> list[str]:
    """Returns the trained parameters that get no gradient from a row, nor does any of the same kind in other blocks.

    The model has no gradients afterwards, and its modes and the random states are as before.
    """
    try:
        with undisturbed(model), torch.enable_grad():
            value = loss(model, row)
            if value.requires_grad:
                value.backward()
        reached = {_same_kind(name) for name, parameter in trained.items() if parameter.grad is not None}
    finally:
        for parameter in trained.values():
            parameter.grad = None
    return [name for name in trained if _same_kind(name) not in reached]


def check_reach(model: nn.Module, trained: Mapping[str, nn.Parameter], loss: Loss, batch: Batch) -> None:
    """Raises TrainingError for trained parameters that get no gradient from text in any block.

    This is tried on a few made-up tokens, and if some are not reached, on the first row of the batch: some layers only
    run on longer rows. What other blocks reach is left to `check_gradients`: few tokens do not reach every expert. So
    are batches with more than text, and Reformers, whose rows have one length in training.
    The model has no gradients afterwards, and its modes and the random states are as before.
    """
    if isinstance(batch["input_ids"], FakeTensor) or _other_inputs(batch) or architecture.is_reversible(model):
        return
    (length,) = length_within(model, [min(MADE_UP_LENGTH, batch["input_ids"].shape[1])])
    tokens = MadeUpRows(model, batch).tokens(1, max(2, length))
    if task_loss(model, batch) is None:
        made_up = {"input_ids": tokens, "labels": tokens}
        rows = [made_up, {name: value[:1] for name, value in {**batch, "labels": batch["input_ids"]}.items()}]
    else:  # the labels are not tokens, so the batch itself tells
        rows = [{name: value[:1] for name, value in batch.items()}, batch]
    try:
        if all(missing := _unreached(model, trained, loss, row) for row in rows):
            raise TrainingError(_sentence(model, trained, missing, "from text"))
    except Exception as error:
        if not is_out_of_memory(error):  # the step itself says what to do then
            raise
