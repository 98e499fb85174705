"""The losses of tasks other than that of a causal language model, each computed from the model's own logits in fp32.

    classes              cross-entropy of the class of each sequence
    numbers              squared error of the one output
    several classes      binary cross-entropy of each class of each sequence
    words                cross-entropy of the class of each labelled token
    preferences          -log sigmoid(reward of the chosen text - reward of the rejected one)  (Bradley and Terry, 1952)
    targets              cross-entropy of each token that a decoder is to write
    hidden tokens        cross-entropy of each token that was hidden
    similar texts        cross-entropy of an anchor's own text among all other texts of the batch, by the cosine of
                         their embeddings / 0.05 (InfoNCE; MultipleNegativesRankingLoss of sentence-transformers)

Each is a sum, whose count of summands is that of the mean which transformers' models (trl's RewardTrainer for
preferences) compute, so that the gradients of several batches add up to those of one large batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite import architecture
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.batching import Batch, labelled_tokens
from qlora_lite.errors import ConfigError
from qlora_lite.tasks import (
    EMBEDDING,
    MASKED_LM,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    Task,
    task_of,
)

REJECTED = "rejected_"
SIMILAR_PREFIXES = ("positive_", "negative_")
OTHER_TEXTS = (REJECTED, *SIMILAR_PREFIXES)
TEMPERATURE = 0.05


@dataclass(frozen=True)
class TaskLoss:
    """The loss of a task. outputs: what the model says of a batch, in fp32. loss: summed, of outputs and labels.

    count: how many summands the loss has. decided: what the model decides by its outputs. by_rows: whether the loss of
    a batch is the sum of those of its rows, so that it may be divided.
    """

    name: str
    outputs: Callable[[nn.Module, Batch], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], Tensor]
    decided: Callable[[Tensor], Tensor]
    by_rows: bool = True

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the summed loss of a batch."""
        return self.loss(self.outputs(model, batch), batch["labels"])


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Returns the arguments of a model for a batch, without labels and without a cache of keys and values."""
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(**_inputs(model, batch)).logits
    return logits.float()


def _one_logit(model: nn.Module, batch: Batch) -> Tensor:
    return _logits(model, batch)[:, 0]


def _joined(model: nn.Module, batch: Batch, prefixes: Sequence[str]) -> Batch:
    """Returns all texts of a batch as rows, first those with the first prefix."""
    joined: Batch = {}
    for name, value in {"input_ids": pad_token_of(model) or 0, "attention_mask": 0}.items():
        sides = [batch[f"{prefix}{name}"] for prefix in prefixes]
        longest = max(side.shape[1] for side in sides)
        joined[name] = torch.cat([F.pad(side, (0, longest - side.shape[1]), value=value) for side in sides])
    return joined


def _rewards(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the rewards (rows, 2) of chosen and rejected texts, which the model computes as rows of one batch."""
    return torch.stack(_one_logit(model, _joined(model, batch, ("", REJECTED))).chunk(2), dim=1)


def _target_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the logits of the decoder, which gets the labels shifted as the model itself shifts them."""
    logits: Tensor = model(**_inputs(model, batch), labels=batch["labels"]).logits
    return logits.float()


def embeddings(model: nn.Module, inputs: Batch) -> Tensor:
    """Returns embeddings of texts (rows, features): the mean of the last hidden states of the tokens of each.

    Of a model in which tokens see earlier ones alone it is the state of the last token, which has seen all.
    """
    hidden: Tensor = model(**_inputs(model, inputs)).last_hidden_state.float()
    mask = inputs["attention_mask"]
    if any(getattr(module, "is_causal", False) is True for module in model.modules()):
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def _similarities(model: nn.Module, batch: Batch) -> Tensor:
    """Returns cosine / TEMPERATURE of each anchor (rows) and each other text of the batch, its own ones first."""
    prefixes = [prefix for prefix in ("", *SIMILAR_PREFIXES) if f"{prefix}input_ids" in batch]
    found = F.normalize(embeddings(model, _joined(model, batch, prefixes)), dim=-1)
    rows = len(batch["input_ids"])
    return found[:rows] @ found[rows:].T / TEMPERATURE


def _info_nce(similarities: Tensor, labels: Tensor) -> Tensor:
    own = torch.arange(len(similarities), device=similarities.device)
    return F.cross_entropy(similarities, own, reduction="sum")


def _finds_its_own(similarities: Tensor) -> Tensor:
    return (similarities.argmax(-1).cpu() == torch.arange(len(similarities))).long()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def _squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(outputs, labels.float(), reduction="sum")


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")


def _bradley_terry(rewards: Tensor, labels: Tensor) -> Tensor:
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).sum()


def _labelled(labels: Tensor) -> Tensor:
    return (labels != IGNORE_INDEX).sum()


def _all(labels: Tensor) -> Tensor:
    return torch.tensor(labels.numel())


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


TASK_LOSSES: dict[str, TaskLoss] = {
    loss.name: loss
    for loss in (
        TaskLoss("classes", _logits, _cross_entropy, _labelled, _likeliest),
        TaskLoss("numbers", _one_logit, _squared_error, _all, lambda outputs: outputs),
        TaskLoss("several classes", _logits, _binary_cross_entropy, _all, lambda logits: (logits > 0).long()),
        TaskLoss("words", _logits, _cross_entropy, _labelled, _likeliest),
        TaskLoss("preferences", _rewards, _bradley_terry, _all, lambda rewards: (rewards[:, 0] > rewards[:, 1]).long()),
        TaskLoss("targets", _target_logits, _cross_entropy, _labelled, _likeliest),
        TaskLoss("hidden tokens", _logits, _cross_entropy, _labelled, _likeliest),
        TaskLoss("similar texts", _similarities, _info_nce, _all, _finds_its_own, by_rows=False),
    )
}


OF_TASK = {TOKEN_CLASSIFICATION: "words", SEQ2SEQ_LM: "targets", MASKED_LM: "hidden tokens"}


def pad_token_of(model: nn.Module) -> int | None:
    """Returns the padding token that a model's config names, None if it names none."""
    found = architecture.config_value(architecture.text_config(getattr(model, "config", None)), "pad_token_id")
    return found if isinstance(found, int) else None


def task_loss(model: nn.Module, batch: Batch) -> TaskLoss | None:
    """Returns the loss of a model's task for such batches; None for a causal language model."""
    task = task_of(model)
    if task in OF_TASK:
        return TASK_LOSSES[OF_TASK[task]]
    if task is EMBEDDING and f"{SIMILAR_PREFIXES[0]}input_ids" in batch:
        return TASK_LOSSES["similar texts"]
    if task is not SEQUENCE_CLASSIFICATION:
        return None
    if f"{REJECTED}input_ids" in batch:
        return TASK_LOSSES["preferences"]
    labels = batch["labels"]
    if labels.is_floating_point():
        return TASK_LOSSES["numbers" if labels.dim() == 1 else "several classes"]
    return TASK_LOSSES["classes"]


def labelled(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the number of summands of a batch's loss: labelled tokens, sequences, or classes of sequences."""
    found = task_loss(model, batch)
    return labelled_tokens(batch) if found is None else found.count(batch["labels"])


def tokens_in(batch: Batch) -> int:
    """Returns the number of tokens of a batch, padding included."""
    return sum(value.numel() for name, value in batch.items() if name.endswith("input_ids"))


def check_task_batch(model: nn.Module, batch: Batch) -> None:
    """Raises ConfigError for labels that the model's head has no output for, and padding that it would take for text.

    Called with the first batch of a run.
    """
    found, task = task_loss(model, batch), task_of(model)
    if found is None:
        return
    if not task.has_labels:
        _check_texts(model, batch, task)
        return
    labels, rows, outputs = batch["labels"], len(batch["input_ids"]), _outputs(model)
    if found.name in ("numbers", "preferences") and outputs != 1:
        raise ConfigError(f"{found.name} need a head with one output, and it has {outputs}; load it with labels=1")
    shapes = {"classes": (rows,), "numbers": (rows,), "several classes": (rows, outputs), "preferences": (rows,)}
    wanted = shapes.get(found.name, tuple(batch["input_ids"].shape))
    if tuple(labels.shape) != wanted:
        raise ConfigError(f"labels of {found.name} must be of shape {wanted}; got {tuple(labels.shape)}")
    if found.name in ("classes", "words"):
        known = labels[labels != IGNORE_INDEX]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < outputs:
            raise ConfigError(
                f"labels must be in [0, {outputs}), the outputs of the head; got {known.unique().tolist()}"
            )
    _check_padding(model, batch, task)


def _check_texts(model: nn.Module, batch: Batch, task: Task) -> None:
    """Raises ConfigError for a batch of a task without labels that the model would learn nothing from."""
    labels = batch["labels"]
    if task is MASKED_LM and labels.shape == batch["input_ids"].shape:
        is_labelled = labels != IGNORE_INDEX
        if bool((labels == batch["input_ids"])[is_labelled].all()) and int(is_labelled.sum()) * 2 > labels.numel():
            raise ConfigError(
                f"no token of a batch is hidden, and a {type(model).__name__} sees them all, so that it would learn to "
                f"copy; hide some (Masking, task_batches), or train a causal language model"
            )
    if (
        task is EMBEDDING
        and hasattr(model, "decoder")
        and architecture.config_value(getattr(model, "config", None), "is_encoder_decoder")
    ):
        raise ConfigError(
            f"a {type(model).__name__} has an encoder and a decoder; load the encoder alone for embeddings, as "
            f"task='T5EncoderModel'"
        )


def _outputs(model: nn.Module) -> int:
    return int(architecture.config_value(getattr(model, "config", None), "num_labels") or 0)


def _check_padding(model: nn.Module, batch: Batch, task: Task) -> None:
    """Decoders take the last token that is not padding, by its id, for the sequence."""
    mask, pad = batch.get("attention_mask"), pad_token_of(model)
    if task is not SEQUENCE_CLASSIFICATION or mask is None or bool((mask == 1).all()):
        return
    padding = set(batch["input_ids"][mask == 0].unique().tolist())
    if pad is not None and padding != {pad}:
        raise ConfigError(
            f"rows are padded with the tokens {sorted(padding)}, and the config has pad_token_id {pad}; pad with that"
        )
