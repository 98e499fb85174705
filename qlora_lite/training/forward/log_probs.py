"""`token_log_probs`: the log-probability of each label under a causal language model, without the logits.

The models may be fused, adapted by `add_lora_`, or adapted by peft. Whether the head's weight is enough is found out on
the model's first rows, as in `train`. Where it is not, the logits of all tokens are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.compute.token_log_probs import TokenStatistics
from qlora_lite.errors import ConfigError, InputError
from qlora_lite.tasks import CAUSAL_LM, task_of
from qlora_lite.training.forward.byte_budget import fit_budget
from qlora_lite.training.forward.fuse import ChosenLoss, chosen_loss, fusion_of, own_forward, without_peft
from qlora_lite.training.objective.losses import LOGIT_FREE, checked_logits
from qlora_lite.training.objective.token_statistics import statistics_of_hidden, statistics_of_logits

# The losses of models that are not fused, by model; those of fused models are in model.fusion.
_losses: WeakKeyDictionary[nn.Module, ChosenLoss] = WeakKeyDictionary()


def _needs_logits(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether the logits of all tokens are needed. The model is tried once, its head is looked at in each call."""
    known = fusion_of(model) or _losses.setdefault(model, ChosenLoss())
    return chosen_loss(model, known, batch) != LOGIT_FREE


def _hidden_states(model: Any, given: dict[str, Any]) -> Tensor:
    return architecture.base_model(model)(**given | {"use_cache": False}).last_hidden_state  # type: ignore[no-any-return]


def token_statistics(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    statistics: Collection[str] = (),
    temperature: float = 1.0,
    labels_are_shifted: bool = False,
    hidden_states: Callable[[Any, dict[str, Any]], Tensor] | None = None,
    **inputs: Any,
) -> TokenStatistics:
    """Returns log-probabilities as `token_log_probs`, and figures of the same shape that `statistics` names.

    statistics: of `entropy` (differentiable), `log_sum_sq_probs`, `mean_logits` and `is_top1`. temperature: divides the
    logits. labels_are_shifted: label t belongs to position t already; the results are then `(rows, tokens)`.
    hidden_states: (model, inputs) -> the inputs of the head; a caller that needs more of this forward gives its own.
    """
    model = without_peft(model)
    if task_of(model) is not CAUSAL_LM:
        raise ConfigError(f"log-probabilities of tokens need a causal language model; got a {type(model).__name__}")
    if input_ids.shape != labels.shape:
        raise InputError(f"labels should have the shape {tuple(input_ids.shape)}; got {tuple(labels.shape)}")
    given = {"input_ids": input_ids, **{name: value for name, value in inputs.items() if value is not None}}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)} | {"labels": labels}
    own_labels = labels if labels_are_shifted else labels[:, 1:]
    last = None if labels_are_shifted else -1
    with own_forward(model):
        needs_logits = _needs_logits(model, tensors)

        def found() -> TokenStatistics:
            if needs_logits:
                logits = checked_logits(model, model(**given | {"use_cache": False}), input_ids)[:, :last]
                return statistics_of_logits(logits, own_labels, statistics, temperature)
            hidden = (hidden_states or _hidden_states)(model, given)[:, :last]
            return statistics_of_hidden(model, hidden, own_labels, statistics, temperature)

        if (fusion := fusion_of(model)) is not None:
            fit_budget(model, fusion.dial, input_ids.numel(), lambda: found().log_probs.sum())
        return found()


def token_log_probs(model: nn.Module, input_ids: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
    """Returns the log-probability of each label `(rows, tokens - 1)`, in fp32, differentiable, without the logits.

        log_probs[:, t] = log_softmax(logits[:, t])[labels[:, t + 1]]

    input_ids, labels: `(rows, tokens)`; labels of -100 give 0. inputs: further arguments of the model, such as
    `attention_mask`. The first call makes the checks of `train`: causality, positions, packing.
    Raises InputError for labels that do not fit, and ConfigError for a model that is not a causal language model.
    """
    return token_statistics(model, input_ids, labels, **inputs).log_probs
