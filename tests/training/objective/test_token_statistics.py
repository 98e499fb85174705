"""Tests that figures from hidden states and from logits are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora_lite.compute.token_log_probs import STATISTICS
from qlora_lite.training.objective.token_statistics import statistics_of_hidden, statistics_of_logits


@pytest.mark.parametrize("family", ["LlamaConfig", "Gemma2Config", "GraniteConfig"])
def test_both_ways_agree(family: str, small_model: Callable[..., Any]) -> None:
    model = small_model(family)
    tokens = torch.arange(16, 36).view(2, 10)
    labels = tokens.roll(-1, 1)
    labels[0, :3] = -100
    hidden = model.base_model(tokens).last_hidden_state
    of_hidden = statistics_of_hidden(model, hidden, labels, STATISTICS, 0.8)
    of_logits = statistics_of_logits(model(tokens).logits, labels, STATISTICS, 0.8)
    for one, other in zip(of_hidden, of_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    alone = statistics_of_logits(model(tokens).logits, labels, (), 0.8)
    assert alone[1:] == (None,) * 4
