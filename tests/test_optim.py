"""Learning rates over the steps, and what the optimizers hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_lite.config import TrainConfig
from qlora_lite.optim import AdamW16, learning_rate_factor, make_optimizer


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


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw16_is_adamw(weight_decay: float) -> None:
    start = torch.randn(8, 16)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.01, "weight_decay": weight_decay}
    optimizers = AdamW16([ours], **options), torch.optim.AdamW([theirs], **options)
    for step in range(10):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)) * 10.0 ** (-step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters_keep_fp32_states_and_survive_small_gradients(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(8, 16).to(dtype))
    before = weight.detach().clone()
    optimizer = make_optimizer([weight], TrainConfig(learning_rate=0.1))
    for _ in range(2):
        weight.grad = torch.full_like(weight, 1e-6)
        optimizer.step()
    assert all(state.dtype == torch.float32 for state in optimizer.state[weight].values())
    torch.testing.assert_close(weight.float(), before.float() - 0.2, rtol=0.01, atol=0.02)
