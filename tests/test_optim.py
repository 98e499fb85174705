"""Learning rates over the steps, and what the optimizers hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_lite.config import TrainConfig
from qlora_lite.optim import learning_rate_factor, make_optimizer


def test_warmup_then_cosine_to_zero() -> None:
    config = TrainConfig(steps=10, warmup_steps=4)
    factors = [learning_rate_factor(step, config) for step in range(11)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.5) and factors[10] == pytest.approx(0.0)


def test_eight_bit_states_are_bytes_and_learn_like_fp32() -> None:
    weights = []
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(64, 128))
        optimizer = make_optimizer([weight], TrainConfig(optimizer=name, learning_rate=0.1))
        for _ in range(20):
            optimizer.zero_grad()
            weight.square().mean().backward()
            optimizer.step()
        weights.append(weight.detach())
    state = optimizer.state[weight]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert (weights[0] - weights[1]).norm() < 0.05 * weights[0].norm() + 1.0
