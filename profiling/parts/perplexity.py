"""Measures the perplexity of a model on windows of text."""

from __future__ import annotations

import math
from typing import Any

import torch

from qlora_lite.training.forward.fused_forward import fused
from qlora_lite.training.objective.losses import logit_free_loss


def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Returns exp of the mean loss over `(windows, tokens)` token ids; the first token of a window has no loss."""
    total = 0.0
    with torch.no_grad(), fused(model):
        for window in windows.split(2):
            total += float(logit_free_loss(model, {"input_ids": window, "labels": window}))
    return math.exp(total / (windows.numel() - len(windows)))
