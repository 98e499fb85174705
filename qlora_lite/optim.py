"""Optimizers of the adapters and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlora_lite.config import TrainConfig


class AdamW16(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101, algorithm 2) over 16-bit parameters, with its states and its arithmetic in fp32.

    torch's AdamW keeps the states in the parameter's dtype, and in fp16 its epsilon and most squares of gradients are
    zero: 0 / 0. Here a parameter loses only what its own format cannot hold, when the sum is rounded to it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        (beta1, beta2), grad = group["betas"], cast(Tensor, parameter.grad).float()
        state["step"] += 1
        count = float(state["step"])
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
        new = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
        parameter.copy_(new.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**count)))


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over these parameters, with fp32 states or bitsandbytes' blockwise 8-bit ones.

    16-bit parameters get `AdamW16` for the former.

    The 8-bit states of a parameter under 4096 values stay fp32, as bitsandbytes has it.
    """
    parameters = list(parameters)
    if config.optimizer == "adamw" and any(parameter.dtype.itemsize < 4 for parameter in parameters):
        return AdamW16(parameters, config.learning_rate, config.weight_decay)
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
