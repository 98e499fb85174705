"""Three ways to compute the loss of a batch: the cross-entropy of each next token, and what the config adds to it.

logit_free_loss    from the last hidden states and the head's weight, without the logits of all tokens
logits_loss        from the logits that the model returns
model_loss         the loss that the model returns

Each is a sum over labelled tokens, so that the gradients of several batches add up to those of one large batch. A loss
of the experts' load that the config asks for is added in proportion to the labelled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite import architecture
from qlora_lite.compute.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from qlora_lite.compute.products.frozen_weight import weight_of
from qlora_lite.data.batching import Batch, labelled_tokens
from qlora_lite.errors import ConfigError, QLoRAError
from qlora_lite.lora.auxiliary_layers import TrainableTokensLayer, TrainedCopy
from qlora_lite.lora.layer import LoraLayer

Loss = Callable[[nn.Module, Batch], Tensor]

LOGIT_FREE, FROM_LOGITS, OF_MODEL = "logit-free", "logits", "model"


@contextmanager
def refused_inputs(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Turns the errors by which a model refuses a batch within the block into ConfigErrors."""
    try:
        yield
    except QLoRAError:
        raise
    except (ValueError, IndexError) as error:
        shape = tuple(batch["input_ids"].shape)
        why = " ".join(str(error).split())
        raise ConfigError(f"a {type(model).__name__} does not take input_ids of shape {shape}: {why}") from error


def base_of_head(head: nn.Module) -> nn.Module:
    """Returns the output head without its adapter or trained copy."""
    return head.base_layer if isinstance(head, (LoraLayer, TrainedCopy, TrainableTokensLayer)) else head


def head_arguments(model: nn.Module, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Returns hidden states in the dtype of the head's products, and its tensors and options by argument.

    They are arguments of `linear_cross_entropy` and `linear_log_probs`. hidden: the input of the output head.
    """
    head: Any = architecture.output_head(model)
    lora = replaced = None
    if isinstance(head, LoraLayer) and head.adapter_enabled and not head.merged:
        lora = (*head.factors, head.scaling)
    if isinstance(head, TrainableTokensLayer) and head.adapter_enabled:
        replaced = (head.rows.tokens, head.rows.values)
    dtype = getattr(base_of_head(head), "compute_dtype", None) or hidden.dtype
    tensors = {"weight": weight_of(head), "bias": head.bias, "lora": lora, "replaced": replaced}
    return hidden.to(dtype), tensors | architecture.logit_options(model)


def head_loss(model: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Returns the summed cross-entropy of the labels, of which token t + 1 belongs to hidden state t.

    hidden: (rows, tokens, features), the input of the output head. labels: (rows, tokens).
    """
    rows, arguments = head_arguments(model, hidden[:, :-1])
    return linear_cross_entropy(rows, labels=labels[:, 1:], reduction="sum", **arguments)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the summed cross-entropy of the labels, of which token t + 1 belongs to the logits of token t, in fp32.

    logits: (rows, tokens, vocabulary). labels: (rows, tokens).
    """
    flat = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def logit_free_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the loss from the last hidden states and the head's weight.

    The logits of all tokens are never in memory (`linear_cross_entropy`).
    """
    if not architecture.declares_router_loss(model):
        return head_loss(model, architecture.hidden_states(model, batch), batch["labels"])
    no_labels = torch.full_like(batch["labels"][:, :1], IGNORE_INDEX)
    hidden, output = architecture.hidden_states_with_router_loss(model, batch, no_labels)
    of_routers: Tensor = output.loss
    return head_loss(model, hidden, batch["labels"]) + labelled_tokens(batch) * of_routers


def logits_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the loss from the logits of all tokens. Raises ConfigError if the model does not return them."""
    labels = batch["labels"]
    if not architecture.declares_router_loss(model):
        return cross_entropy(logits_of(model, batch), labels)
    output = architecture.output_with_router_loss(model, batch, torch.full_like(labels, IGNORE_INDEX))
    of_routers: Tensor = output.loss
    return cross_entropy(checked_logits(model, output, labels), labels) + labelled_tokens(batch) * of_routers


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the logits of all tokens. Raises ConfigError if the model does not return them."""
    inputs = architecture.model_inputs(batch)
    return checked_logits(model, model(**inputs, use_cache=False), batch["input_ids"])


def checked_logits(model: nn.Module, output: object, tokens: Tensor) -> Tensor:
    """Returns the logits in a model's output. Raises ConfigError if there are none for each of the tokens."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == tokens.shape:
        return logits
    got = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
    raise ConfigError(
        f"a {type(model).__name__} returns {got} for input_ids of shape {tuple(tokens.shape)}; train needs a causal "
        f"language model, which returns logits for each token"
    )


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the loss that the model computes itself, a mean over labelled tokens, times their number."""
    loss: Tensor = model(**architecture.model_inputs(batch), labels=batch["labels"], use_cache=False).loss
    return loss * labelled_tokens(batch)


LOSSES: dict[str, Loss] = {LOGIT_FREE: logit_free_loss, FROM_LOGITS: logits_loss, OF_MODEL: model_loss}
