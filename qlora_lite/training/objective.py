"""The loss that a model is trained with: without logits if that equals the model's own loss, else the model's own.

Both are sums over labelled tokens, so that the gradients of several batches add up to those of one large batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qlora_lite import architecture
from qlora_lite.compute.cross_entropy import linear_cross_entropy
from qlora_lite.data.batching import Batch, labelled_tokens
from qlora_lite.errors import ConfigError
from qlora_lite.lora.auxiliary_layers import TrainableTokensLayer, TrainedCopy
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.signals import check_signals
from qlora_lite.surgery import has_own_forward

Loss = Callable[[nn.Module, Batch], Tensor]

PROBE_TOKENS = 64
# bf16 has 8 significant bits: two orders of summation differ by about 2^-8 in a logit, and by less in a mean loss.
PROBE_TOLERANCE = 5e-3


def logit_free_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the sum of the cross-entropy over labelled tokens, from the last hidden states and the head's weight.

    The logits of all tokens are never in memory (`linear_cross_entropy`).
    """
    head: Any = architecture.output_head(model)
    hidden = architecture.hidden_states(model, batch)[:, :-1]
    lora = replaced = None
    if isinstance(head, LoraLayer) and head.adapter_enabled and not head.merged:
        lora = (*head.factors, head.scaling)
    if isinstance(head, TrainableTokensLayer) and head.adapter_enabled:
        replaced = (head.rows.tokens, head.rows.values)
    hidden = hidden.to(getattr(_base_of(head), "compute_dtype", None) or hidden.dtype)
    options: Any = architecture.logit_options(model)
    return linear_cross_entropy(
        hidden,
        head.weight,
        batch["labels"][:, 1:],
        head.bias,
        lora=lora,
        replaced=replaced,
        reduction="sum",
        **options,
    )


def _base_of(head: nn.Module) -> nn.Module:
    """Returns the head without its adapter or trained copy."""
    return head.base_layer if isinstance(head, (LoraLayer, TrainedCopy, TrainableTokensLayer)) else head


def _needs_logits_reason(model: nn.Module) -> str | None:
    """Returns why the loss cannot be computed from the last hidden states and the head's weight; None if it may be."""
    head = architecture.output_head(model)
    if head is None or getattr(model, "base_model", model) is model:
        return "the model does not say which module is its output head"
    base = _base_of(head)
    if not (hasattr(base, "in_features") and hasattr(base, "weight")) or has_own_forward(base):
        return f"its output head is a {type(head).__name__}"
    if isinstance(head, LoraLayer) and head.variant.gain is not None:
        return f"the adapter of its output head is of variant {head.variant.name}"
    if isinstance(head, LoraLayer) and head.dropout > 0:
        return "the adapter of its output head has dropout"
    return None


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the loss that the model computes itself, a mean over labelled tokens, times their number.

    Raises ConfigError if the model does not return a loss.
    """
    loss = getattr(model(**batch, use_cache=False), "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(f"a {type(model).__name__} returns no loss for labels; train needs a causal language model")
    return loss * labelled_tokens(batch)


@torch.no_grad()
def _probe(model: nn.Module, batch: Batch) -> str | None:
    """Compares both losses on the start of one row; returns how they differ, None if they agree.

    The labels are the tokens that the model finds most likely, because their loss depends most on the logits. For
    unlikely tokens the loss of an untrained model is about the logarithm of the vocabulary size, whatever it computes.
    """
    row = {name: value[:1, :PROBE_TOKENS] for name, value in batch.items()}
    row["labels"] = row["input_ids"].clone()
    training = model.training
    model.eval()
    try:
        logits = getattr(model(**row, use_cache=False), "logits", None)
        if isinstance(logits, Tensor) and logits.shape[:2] == row["labels"].shape:
            row["labels"][:, 1:] = logits[:, :-1].argmax(-1)
        check_signals()
        expected = float(model_loss(model, row))
        check_signals()
        found = float(logit_free_loss(model, row))
    finally:
        model.train(training)
    if abs(expected - found) <= PROBE_TOLERANCE * abs(expected):
        return None
    return f"on a probe its own loss is {expected:.6g} and the one without logits {found:.6g}"


@torch.no_grad()
def check_packing(model: nn.Module, batch: Batch) -> None:
    """Raises ConfigError if the batch packs several examples into a row and the model lets them attend to each other.

    This is tried on the batch: other tokens in the first example must not change the hidden states of the second.
    """
    if "position_ids" not in batch or "attention_mask" in batch:
        return
    starts = (batch["position_ids"] == 0).sum(1)
    row = int(starts.argmax())
    if starts[row] < 2:
        return
    probe = {
        "input_ids": batch["input_ids"][row : row + 1].clone(),
        "position_ids": batch["position_ids"][row : row + 1],
    }
    second = int((probe["position_ids"][0] == 0).nonzero()[1])
    training = model.training
    model.eval()
    try:
        before = architecture.hidden_states(model, probe)[:, second:]
        probe["input_ids"][:, :second] = probe["input_ids"][:, second : second + 1]
        after = architecture.hidden_states(model, probe)[:, second:]
    finally:
        model.train(training)
    if not torch.equal(before, after):
        raise ConfigError(f"a {type(model).__name__} lets packed examples see each other; use packing=False")


# Models whose probe has run on fake tensors. Fake losses have no value, so the probe runs there only for its memory,
# which is the same each time.
_rehearsed: WeakSet[nn.Module] = WeakSet()


def _was_rehearsed(model: nn.Module, batch: Batch) -> bool:
    if not isinstance(batch["input_ids"], FakeTensor):
        return False
    was_rehearsed = model in _rehearsed
    _rehearsed.add(model)
    return was_rehearsed


def choose_loss(model: nn.Module, batch: Batch) -> tuple[Loss, str | None]:
    """Returns the loss to train with, and the reason if it is the model's own; None if it is the one without logits."""
    reason = _needs_logits_reason(model)
    if reason is None and not _was_rehearsed(model, batch):
        reason = _probe(model, batch)
    return (logit_free_loss, None) if reason is None else (model_loss, reason)
