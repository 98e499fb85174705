"""Log-probabilities of labels, and other figures of each token, from what a causal language model computes.

Labels belong to the position that predicts them: the label of hidden state t is token t + 1.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.compute.token_log_probs import TokenStatistics, linear_log_probs
from qlora_lite.training.objective.losses import head_arguments


def statistics_of_hidden(
    model: nn.Module, hidden: Tensor, labels: Tensor, statistics: Collection[str], temperature: float
) -> TokenStatistics:
    """Returns the figures of labels `(rows, tokens)` from the head's inputs `(rows, tokens, features)`."""
    rows, arguments = head_arguments(model, hidden)
    return linear_log_probs(rows, labels=labels, statistics=statistics, temperature=temperature, **arguments)


def statistics_of_logits(
    logits: Tensor, labels: Tensor, statistics: Collection[str], temperature: float
) -> TokenStatistics:
    """Returns the figures of labels `(rows, tokens)` from logits `(rows, tokens, vocabulary)`, in plain torch.

    For models whose head is more than a weight.
    """
    has_label = labels != IGNORE_INDEX
    z = logits.float() / temperature
    log_p = F.log_softmax(z, -1)
    found: dict[str, Any] = {
        "log_probs": log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1),
        "is_top1": logits.argmax(-1) == labels,
    }
    if "entropy" in statistics:
        found["entropy"] = -(log_p.exp() * log_p).sum(-1)
    with torch.no_grad():
        found["log_sum_sq_probs"] = (2 * log_p).logsumexp(-1)
        found["mean_logits"] = z.mean(-1)
    names = ("log_probs", *statistics)
    return TokenStatistics(**{name: found[name] * has_label for name in names})
