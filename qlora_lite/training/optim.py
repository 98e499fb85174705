"""The optimizers of the trained parameters, their states in files, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn

from qlora_lite.checkpoints.files import excerpt
from qlora_lite.compute.devices import on_cpu
from qlora_lite.errors import CheckpointError
from qlora_lite.training.config import CONSTANT, LINEAR, TrainConfig

SAME_AS = "same_as"
# States of torch's and bitsandbytes' AdamW that have the shape of their parameter.
LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "state1", "state2")


class ParameterGroup(TypedDict):
    """Parameters of one learning rate and weight decay. initial_lr: the peak rate, as torch's schedulers name it."""

    params: list[nn.Parameter]
    lr: float
    initial_lr: float
    weight_decay: float


class AdamW16(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101, algorithm 2) for 16-bit parameters, with states and arithmetic in fp32.

    torch's AdamW has its states in the dtype of the parameter. In fp16, its epsilon and most squares of gradients are
    then zero, and the update is 0 / 0. Here only the updated parameter is rounded to its dtype.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter] | Sequence[ParameterGroup], lr: float, weight_decay: float
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8}
        super().__init__(cast(Iterable[nn.Parameter], parameters), defaults)

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


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW on a CPU, for parameters of one dtype.

    torch adds 1 to the step count of each parameter, and makes a tensor of the number each time: four calls more.
    """

    def __init__(self, groups: Sequence[ParameterGroup], lr: float, weight_decay: float) -> None:
        super().__init__(cast(list[dict[str, Any]], groups), lr=lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            if not lists[0]:  # none of its parameters has a gradient
                continue
            torch._foreach_add_(lists[-1], [torch.ones(())] * len(lists[-1]))
            (beta1, beta2), names = group["betas"], ("lr", "weight_decay", "eps", "amsgrad", "maximize")
            torch._fused_adamw_(*lists, beta1=beta1, beta2=beta2, **{name: group[name] for name in names})
        return loss


def _groups(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> list[ParameterGroup]:
    """Returns the parameters grouped by peak learning rate and weight decay.

    LoRA+ (arXiv:2402.12354): the rate of B and of vectors is `lora_plus_ratio` times that of other matrices.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        is_vector = parameter.dim() < 2
        fast = is_vector or name.rpartition(".")[2] == "lora_B"
        rate = config.learning_rate * (config.lora_plus_ratio if fast else 1.0)
        groups.setdefault((rate, 0.0 if is_vector else config.weight_decay), []).append(parameter)
    return [
        {"params": group, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), group in groups.items()
    ]


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Returns AdamW for these named parameters, with fp32 states or bitsandbytes' blockwise 8-bit states.

    For fp32 states of 16-bit parameters this is `AdamW16`. bitsandbytes uses fp32 states for parameters of fewer than
    4096 values.
    """
    groups, rate, decay = _groups(parameters, config), config.learning_rate, config.weight_decay
    if config.optimizer == "adamw" and any(parameter.dtype.itemsize < 4 for parameter in parameters.values()):
        return AdamW16(groups, rate, decay)
    if config.optimizer == "adamw":
        # foreach=False: the grouped kernels allocate temporaries of the size of all parameters at once. The fused
        # kernel allocates none. On an accelerator its step counts would be there, but checkpoints have them on the CPU.
        if all(on_cpu(p.device) for p in parameters.values()) and len({p.dtype for p in parameters.values()}) == 1:
            return FusedAdamW(groups, rate, decay)
        return torch.optim.AdamW(cast(list[dict[str, Any]], groups), lr=rate, weight_decay=decay, foreach=False)
    from qlora_lite.quantization.kernels import import_bitsandbytes

    adamw8bit = import_bitsandbytes("bitsandbytes.optim").AdamW8bit
    return adamw8bit(groups, lr=rate, weight_decay=decay)  # type: ignore[no-any-return]


def set_learning_rates_(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets the learning rate of each parameter group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Returns the learning rate at a step (from 0) divided by its peak.

    It rises linearly to 1 at the last step of the warm-up, one step earlier than with transformers, whose first step
    has the rate 0. What follows is as there: `cosine` and `linear` fall to their end in the step after the last.
    """
    warmup = config.steps_of_warmup
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == CONSTANT:
        return 1.0
    done = min(1.0, (step - warmup) / max(1, config.steps - warmup))
    left = 1 - done if config.schedule == LINEAR else 0.5 * (1 + math.cos(math.pi * done))
    least = config.min_learning_rate / config.learning_rate
    return least + (1 - least) * left


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Returns the states by `<parameter>.<state>`: the tensors, each once, and plain data for JSON.

    Plain data are numbers, and for a tensor that several parameters share (bitsandbytes' tables) the name of the first.
    """
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    plain: dict[str, object] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                plain[f"{name}.{key}"] = value
            elif id(value) in first:
                plain[f"{name}.{key}"] = {SAME_AS: first[id(value)]}
            else:
                first[id(value)] = f"{name}.{key}"
                tensors[f"{name}.{key}"] = value
    return tensors, plain


def load_optimizer_state_(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, object],
) -> None:
    """Replaces the states of an optimizer by those that `optimizer_state` returned of another one.

    Raises CheckpointError if a state is of an unknown parameter or has the wrong shape.
    """
    placed: dict[str, Tensor] = {}
    states: dict[str, dict[str, object]] = {}
    for full, value in (*tensors.items(), *plain.items()):
        name, _, key = full.rpartition(".")
        if name not in parameters:
            raise CheckpointError(f"the optimizer has a state {full}, but the model has no parameter {name}")
        if isinstance(value, Tensor):
            if key in LIKE_PARAMETER and value.shape != parameters[name].shape:
                shapes = f"{tuple(value.shape)}, and {name} is {tuple(parameters[name].shape)}"
                raise CheckpointError(f"the optimizer's state {full} is of shape {shapes}")
            # torch's AdamW has its step counts, tensors without dimensions, on the CPU.
            placed[full] = value = value if value.dim() == 0 else value.to(parameters[name].device)
        elif isinstance(value, dict):
            if not isinstance(same := value.get(SAME_AS), str) or same not in placed:
                raise CheckpointError(f"the optimizer's state {full} is that of {excerpt(same)}, which is not there")
            value = placed[same]
        states.setdefault(name, {})[key] = value
    optimizer.state.clear()
    for name, state in states.items():
        optimizer.state[parameters[name]] = state
