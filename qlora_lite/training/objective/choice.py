"""The choice among the losses of losses.py: the one that takes least memory and equals the loss from the logits.

What is right is the cross-entropy of the model's own logits, each token predicted from those before it, and with it the
losses that the config declares. The loss that a model returns need not be that: those of BART's and XLNet's kind do not
shift the labels, and so reward a copy of the present token.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qlora_lite import architecture
from qlora_lite.compute.devices import is_out_of_memory
from qlora_lite.data.batching import Batch
from qlora_lite.errors import QLoRAError
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.signals import check_signals
from qlora_lite.surgery import has_own_forward
from qlora_lite.training.objective.causality import check_causality
from qlora_lite.training.objective.losses import (
    FROM_LOGITS,
    LOGIT_FREE,
    LOSSES,
    OF_MODEL,
    Loss,
    base_of_head,
    cross_entropy,
    head_loss,
    logits_of,
)
from qlora_lite.training.objective.made_up_rows import text_of, undisturbed
from qlora_lite.training.objective.packing import check_packing, is_packed
from qlora_lite.training.objective.task_losses import TASK_LOSSES, check_task_batch, task_loss

PROBE_TOKENS = 64
# How far two losses may differ, as a share of the spread of the logits. bf16 has 8 significant bits: two orders of
# summation differ by about 2^-8 in a logit, and by less in a mean.
TOLERANCE, TOLERANCE_FP32 = 5e-3, 1e-4
ROUNDING = 1e-5  # of a loss itself, a sum in fp32

# The reasons found on fake tensors, by model: what a probe allocates there is the same each time.
_rehearsed: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def head_reason(model: nn.Module) -> str | None:
    """Returns why the head's weight is not enough to compute the loss from what the head gets; None if it is."""
    head = architecture.output_head(model)
    if head is None or architecture.base_model(model) is model:
        return "the model does not say which module is its output head"
    base = base_of_head(head)
    if not (hasattr(base, "in_features") and hasattr(base, "weight")) or has_own_forward(base):
        return f"its output head is a {type(head).__name__}"
    # A layer of another library around the head has the head's weight, and adds to its product.
    if any(part is not base.weight for part in base.children()):
        return f"its output head is a {type(head).__name__} of {type(head).__module__.partition('.')[0]}"
    if isinstance(head, LoraLayer) and head.variant.gain is not None:
        return f"the adapter of its output head is of variant {head.variant.name}"
    if isinstance(head, LoraLayer) and head.dropout > 0:
        return "the adapter of its output head has dropout"
    return None


def _shape_reason(model: nn.Module, logits: Tensor, hidden: Tensor) -> str | None:
    head: Any = architecture.output_head(model)
    vocabulary, features = head.weight.shape
    if hidden.shape[-1] != features:
        return f"its output head takes {features} features, and its last hidden states have {hidden.shape[-1]}"
    if logits.shape[-1] != vocabulary:
        return f"its output head has {vocabulary} outputs, and the model returns {logits.shape[-1]} logits"
    return None


def _logits_and_place(model: Any, row: Batch) -> tuple[Tensor, str | None]:
    """Runs the model on fake tensors. Returns its logits, and that its head takes other tensors than the hidden states.

    The second is None if the last module that ran before the head computes hidden states, and the head gets its output.
    """
    before: list[Tensor | None] = [None]
    same = [False]

    def keep_output(module: nn.Module, args: object, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        first = getattr(first, "last_hidden_state", first)
        before[0] = first if isinstance(first, Tensor) else None

    def compare_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        output, found = before[0], args[0]
        if output is None or output.shape != found.shape:
            same.append(False)
            return
        # FalconMamba's head gets a copy in its dtype, and MiniCPM3 divides what goes into the head.
        is_copy = output.dtype != found.dtype or "logit_scale" in architecture.logit_options(model)
        same.append(is_copy or output.untyped_storage()._cdata == found.untyped_storage()._cdata)

    head: Any = architecture.output_head(model)
    with ExitStack() as stack:
        for module in architecture.base_model(model).modules():
            if module is not head:
                stack.enter_context(module.register_forward_hook(keep_output))
        stack.enter_context(head.register_forward_pre_hook(compare_input))
        logits = logits_of(model, row)
    return logits, None if same[-1] else "its output head does not take the last hidden states as they are"


def _value_reason(model: nn.Module, logits: Tensor, hidden: Tensor) -> str | None:
    """Returns how the loss without logits differs from that of the logits, None if they agree.

    The labels are once the least likely tokens and once the most likely ones. The former show best what is done to the
    logits of a model that is sure of its answers. The loss of the latter is the one that training lowers.
    """
    head: Any = base_of_head(architecture.output_head(model))  # type: ignore[arg-type]
    losses = []
    for choose in (torch.argmin, torch.argmax):
        labels = nn.functional.pad(choose(logits[:, :-1], -1), (1, 0))
        losses.append((float(cross_entropy(logits, labels)), float(head_loss(model, hidden, labels))))
    dtypes = {logits.dtype, hidden.dtype, getattr(head, "compute_dtype", None) or hidden.dtype}
    tolerance = TOLERANCE_FP32 if dtypes == {torch.float32} else TOLERANCE
    spread = losses[0][0] - losses[1][0]
    if all(abs(expected - found) <= tolerance * spread + ROUNDING * abs(expected) for expected, found in losses):
        return None
    expected, found = max(losses, key=lambda pair: abs(pair[0] - pair[1]))
    return f"on a probe the loss of its logits is {expected:.6g} and the one without logits {found:.6g}"


@torch.no_grad()
def _probe(model: nn.Module, batch: Batch) -> str | None:
    """Returns why the loss without logits is not that of the logits, None if it is; tried on the start of one row.

    Fake tensors have no values to compare, so there the model is asked whether its head gets the last hidden states.
    """
    row = {name: value[:1, :PROBE_TOKENS] for name, value in text_of(batch).items() if name != "labels"}
    is_fake = isinstance(batch["input_ids"], FakeTensor)
    with undisturbed(model):
        logits, place_reason = _logits_and_place(model, row) if is_fake else (logits_of(model, row), None)
    check_signals()
    try:
        with undisturbed(model):
            hidden = architecture.hidden_states(model, row)
    except Exception as error:  # the code of any model may raise anything
        if isinstance(error, QLoRAError) or is_out_of_memory(error) or is_fake:
            raise
        first_line = str(error).partition("\n")[0]
        return f"the part of it that computes hidden states does not run alone ({type(error).__name__}: {first_line})"
    check_signals()
    if (reason := _shape_reason(model, logits, hidden)) is not None:
        return reason
    value_reason = _value_reason(model, logits, hidden)
    return place_reason if is_fake else value_reason


def loss_named(name: str) -> Loss:
    """Returns the loss that `choose_loss` named."""
    return TASK_LOSSES[name] if name in TASK_LOSSES else LOSSES[name]


def choose_loss(model: nn.Module, batch: Batch) -> tuple[str, str | None]:
    """Returns the name of the loss to train with, and why it takes the logits of all tokens; None if not so.

    Raises ConfigError if the model does not return logits for each token, or if the batch does not suit its task.
    """
    if (of_task := task_loss(model, batch)) is not None:
        check_task_batch(model, batch)
        return of_task.name, None
    if (coefficient := architecture.z_loss_coefficient(model)) > 0:
        return OF_MODEL, f"its config asks for a loss on the size of the logits (z_loss_coefficient {coefficient:g})"
    reason = head_reason(model)
    if reason is None and isinstance(batch["input_ids"], FakeTensor):
        if model not in _rehearsed:
            _rehearsed[model] = _probe(model, batch)
        reason = _rehearsed[model]
    elif reason is None:
        reason = _probe(model, batch)
    return (LOGIT_FREE, None) if reason is None else (FROM_LOGITS, reason)


def check_sight(model: nn.Module, batch: Batch) -> None:
    """Tries the model on made-up rows: causality, and packing if the batch is packed.

    Raises ConfigError if tokens would see later ones or packed examples each other.
    """
    check_causality(model, batch)
    if is_packed(batch):
        check_packing(model, batch, min(2, len(batch["input_ids"])))


def checked_loss(model: nn.Module, batch: Batch) -> tuple[str, str | None]:
    """Returns `choose_loss`, after `check_sight`, whose errors it raises too."""
    check_sight(model, batch)
    return choose_loss(model, batch)
