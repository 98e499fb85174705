"""Which loss a model is trained with: the one without logits where it equals the model's own, else the model's.

Both are sums over labelled tokens, so that gradients of several batches add up to those of one large batch.
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

PROBE_TOKENS = 64
# bf16 keeps 8 bits: two orders of summation may differ by about 2^-8 in a logit, and by less in their mean loss.
PROBE_TOLERANCE = 5e-3


def headless_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over labelled tokens of the cross-entropy, from the last hidden state and the head's weight."""
    head: Any = architecture.output_head(model)
    hidden = architecture.hidden_states(model, batch)[:, :-1]
    lora = replaced = None
    if isinstance(head, LoraLayer) and head.adapter_enabled and not head.merged:
        lora = (*head.factors, head.scaling)
    if isinstance(head, TrainableTokensLayer) and head.adapter_enabled:
        replaced = (head.rows.tokens, head.rows.values)
    hidden = hidden.to(getattr(_plain(head), "compute_dtype", None) or hidden.dtype)
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


def _plain(head: nn.Module) -> nn.Module:
    """The head without what is trained on it."""
    return head.base_layer if isinstance(head, (LoraLayer, TrainedCopy, TrainableTokensLayer)) else head


def _why_not_headless(model: nn.Module) -> str | None:
    """Why the loss cannot be computed from the last hidden state and the head's weight; None if it can, so far."""
    head = architecture.output_head(model)
    if head is None or getattr(model, "base_model", model) is model:
        return "the model does not say which module is its output head"
    plain = _plain(head)
    if not (hasattr(plain, "in_features") and hasattr(plain, "weight")) or has_own_forward(plain):
        return f"its output head is a {type(head).__name__}"
    if isinstance(head, LoraLayer) and head.variant.gain is not None:
        return f"the adapter of its output head is of variant {head.variant.name}"
    if isinstance(head, LoraLayer) and head.dropout > 0:
        return "the adapter of its output head has dropout"
    return None


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over labelled tokens of the loss that the model itself computes as a mean over them."""
    loss = getattr(model(**batch, use_cache=False), "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(f"a {type(model).__name__} returns no loss for labels; train needs a causal language model")
    return loss * labelled_tokens(batch)


@torch.no_grad()
def _probe(model: nn.Module, batch: Batch) -> str | None:
    """Compares the two losses on the start of one row; says how they differ if they do.

    The labels are what the model itself finds likeliest, for there its loss depends on its logits the most: that of
    tokens which an untrained model does not expect is about the logarithm of the vocabulary, whatever it computes.
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
        theirs = float(own_loss(model, row))
        check_signals()
        ours = float(headless_loss(model, row))
    finally:
        model.train(training)
    if abs(theirs - ours) <= PROBE_TOLERANCE * abs(theirs):
        return None
    return f"on a probe its own loss is {theirs:.6g} and the one without logits {ours:.6g}"


@torch.no_grad()
def check_packing(model: nn.Module, batch: Batch) -> None:
    """ConfigError if the batch packs several examples into a row and this model lets one see those before it.

    Tried on the batch: other tokens in the first example must not move the hidden states of the second.
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


# Models whose probe was rehearsed: fake losses say nothing, so that it is run for its memory, which is the same again.
_rehearsed: WeakSet[nn.Module] = WeakSet()


def _is_known(model: nn.Module, batch: Batch) -> bool:
    if not isinstance(batch["input_ids"], FakeTensor):
        return False
    known = model in _rehearsed
    _rehearsed.add(model)
    return known


def choose_loss(model: nn.Module, batch: Batch) -> tuple[Callable[[nn.Module, Batch], Tensor], str | None]:
    """The loss to train with, and why it is the model's own; None where it is the one without logits."""
    why_not = _why_not_headless(model)
    if why_not is None and not _is_known(model, batch):
        why_not = _probe(model, batch)
    return (headless_loss, None) if why_not is None else (own_loss, why_not)
