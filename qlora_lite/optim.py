"""Optimizers of the adapters and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from qlora_lite.config import TrainConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over these parameters, with fp32 states or bitsandbytes' blockwise 8-bit ones.

    The 8-bit states of a parameter under 4096 values stay fp32, as bitsandbytes has it.
    """
    parameters = list(parameters)
    if config.optimizer == "adamw":
        # foreach=False: the grouped kernels make temporaries of the size of all parameters at once.
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=False)
    from qlora_lite.quantize import import_bitsandbytes

    adamw8bit = import_bitsandbytes("bitsandbytes.optim").AdamW8bit
    return adamw8bit(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)  # type: ignore[no-any-return]


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """What the learning rate is multiplied with at a step (from 0): linear up to 1, then half a cosine down to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    rest = max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / rest)))
