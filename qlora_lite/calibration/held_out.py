"""Compares packed models with the 16-bit model on text that was not calibrated on.

KL(p || q) = sum over the vocabulary of p (log p - log q), the mean over tokens       p: the 16-bit model
perplexity = exp(mean over tokens of -log q(next token))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_lite import architecture
from qlora_lite.calibration.layer_inputs import MASK
from qlora_lite.compute.slicing import row_slices, rows_that_fit

# Logits of one model at once.
LOGIT_BYTES = 32 << 20


@dataclass
class Comparison:
    """Sums over tokens. loss: by model, of the next tokens. kl: of each packed model from the plain one, in nats."""

    tokens: int = 0
    loss: dict[str, float] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)

    def perplexity(self, name: str) -> float:
        """Returns the perplexity of a model."""
        return math.exp(self.loss[name] / self.tokens)

    def mean_kl(self, name: str) -> float:
        """Returns the mean KL divergence of a packed model from the plain one, in nats."""
        return self.kl[name] / self.tokens

    @torch.no_grad()
    def add(self, model: Any, batch: Mapping[str, Tensor], plain: str, hidden: Mapping[str, Tensor]) -> None:
        """Adds a batch. hidden: the inputs of the output head `(rows, tokens, features)`, of `plain` and the others."""
        ids = batch["input_ids"]
        mask = batch.get(MASK)
        counts = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:] != 0
        targets = ids[:, 1:][counts]
        rows = {name: states[:, :-1][counts] for name, states in hidden.items()}
        vocabulary = architecture.vocabulary_size(model) or 1
        for part in row_slices(len(targets), rows_that_fit(LOGIT_BYTES, 4 * vocabulary)):
            of_plain = log_probabilities(model, rows[plain][part])
            for name, states in rows.items():
                found = of_plain if name == plain else log_probabilities(model, states[part])
                loss = F.nll_loss(found, targets[part], reduction="sum")
                self.loss[name] = self.loss.get(name, 0.0) + float(loss)
                if name != plain:
                    kl = F.kl_div(found, of_plain, reduction="sum", log_target=True)
                    self.kl[name] = self.kl.get(name, 0.0) + float(kl)
        self.tokens += len(targets)


def log_probabilities(model: Any, hidden: Tensor) -> Tensor:
    """Returns log-probabilities of the next token `(n, vocabulary)` in fp32, for inputs of the head `(n, features)`."""
    options = architecture.logit_options(model)
    head = architecture.output_head(model)
    assert head is not None  # causal language models have one
    logits: Tensor = head(hidden).float().mul_(options.get("logit_scale", 1.0))
    softcap = options.get("softcap")
    capped = logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
    return capped.log_softmax(-1)
