"""Tests of learning rates over the steps, and of the states of optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.training.config import TrainConfig
from qlora_lite.training.optim import (
    AdamW16,
    FusedAdamW,
    learning_rate_factor,
    load_optimizer_state_,
    make_optimizer,
    optimizer_state,
    set_learning_rates_,
)


def test_warmup_then_cosine_to_zero() -> None:
    config = TrainConfig(steps=10, warmup_steps=4)
    factors = [learning_rate_factor(step, config) for step in range(11)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.5) and factors[10] == pytest.approx(0.0)


def of_transformers(name: str, warmup: int, steps: int, **options: Any) -> list[float]:
    """The factors of a schedule of transformers at each step, and at the step after the last."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
    schedule = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=options)
    return [schedule.lr_lambdas[0](step) for step in range(steps + 1)]


@pytest.mark.parametrize("warmup", [0, 1, 7, 30])
@pytest.mark.parametrize(
    ("schedule", "least", "name", "options"),
    [
        ("cosine", 0.0, "cosine", {}),
        ("linear", 0.0, "linear", {}),
        ("constant", 0.0, "constant_with_warmup", {}),
        ("cosine", 2e-5, "cosine_with_min_lr", {"min_lr": 2e-5}),
    ],
)
def test_schedules_are_those_of_transformers_with_a_warmup_one_step_earlier(
    warmup: int, schedule: str, least: float, name: str, options: dict[str, float]
) -> None:
    config = TrainConfig(steps=30, schedule=schedule, warmup_steps=warmup, min_learning_rate=least)
    ours = [learning_rate_factor(step, config) for step in range(30)]
    theirs = of_transformers(name, warmup, 30, **options)
    assert ours[warmup:] == pytest.approx(theirs[warmup:30], abs=1e-15)
    assert ours[:warmup] == pytest.approx([step / warmup for step in range(1, warmup + 1)])
    assert ours[: warmup - 1] == pytest.approx(theirs[1:warmup]) or not warmup


def test_a_line_ends_at_the_minimum() -> None:
    config = TrainConfig(steps=10, learning_rate=1e-2, schedule="linear", warmup_ratio=0.2, min_learning_rate=1e-3)
    factors = [learning_rate_factor(step, config) for step in (0, 1, 2, 6, 10)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])


def test_eight_bit_states_are_bytes_and_learn_like_fp32() -> None:
    weights = []
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(64, 128))
        optimizer = make_optimizer({"lora_A": weight}, TrainConfig(optimizer=name, learning_rate=0.1))
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


def test_fused_adamw_is_torchs_own_to_the_bit() -> None:
    start = {key: parameter.detach() for key, parameter in adapter_like().items()}
    ours, theirs = ({key: nn.Parameter(value.clone()) for key, value in start.items()} for _ in range(2))
    config = TrainConfig(learning_rate=0.01, weight_decay=0.1, lora_plus_ratio=4)
    optimizer, groups = make_optimizer(ours, config), make_optimizer(theirs, config).param_groups
    assert isinstance(optimizer, FusedAdamW)
    reference = torch.optim.AdamW(groups, fused=True)
    for step in range(4):
        for key in start:
            has_gradient = step % 2 == 0 or key.endswith("A")  # the counts of B are others than those of A
            for parameter in (ours[key], theirs[key]):
                generator = torch.Generator().manual_seed(step)
                parameter.grad = torch.randn(64, 128, generator=generator) if has_gradient else None
        optimizer.step()
        reference.step()
    assert all(torch.equal(ours[key], theirs[key]) for key in start)
    for key in start:
        mine, other = optimizer.state[ours[key]], reference.state[theirs[key]]
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters_keep_fp32_states_and_survive_small_gradients(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(8, 16).to(dtype))
    before = weight.detach().clone()
    optimizer = make_optimizer({"lora_A": weight}, TrainConfig(learning_rate=0.1))
    for _ in range(2):
        weight.grad = torch.full_like(weight, 1e-6)
        optimizer.step()
    assert all(state.dtype == torch.float32 for state in optimizer.state[weight].values())
    torch.testing.assert_close(weight.float(), before.float() - 0.2, rtol=0.01, atol=0.02)


def adapter_like() -> dict[str, nn.Parameter]:
    return {f"model.{n}.lora_{p}": nn.Parameter(torch.randn(64, 128)) for n in (0, 1) for p in "AB"}


def rates(groups: list[dict[str, Any]], names: dict[int, str]) -> dict[str, float]:
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_lora_plus_has_the_groups_of_peft(name: str) -> None:
    import peft
    from peft.optimizers import create_loraplus_optimizer

    holder = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    theirs = peft.get_peft_model(holder, peft.LoraConfig(r=2, target_modules=["0", "1"], use_dora=True))
    reference = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
    named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    ours = {name.replace(".default.weight", ""): parameter for name, parameter in named.items()}
    optimizer = make_optimizer(ours, TrainConfig(learning_rate=0.01, lora_plus_ratio=16, optimizer=name))
    called = {id(parameter): name for name, parameter in named.items()}
    assert rates(optimizer.param_groups, called) == rates(reference.param_groups, called)
    assert sorted(set(rates(optimizer.param_groups, called).values())) == [0.01, 0.16]


@pytest.mark.parametrize(
    ("name", "dtype"), [("adamw", torch.float32), ("adamw8bit", torch.float32), ("adamw", torch.bfloat16)]
)
def test_b_moves_at_its_own_rate_as_if_it_were_alone(name: str, dtype: torch.dtype) -> None:
    start = {key: parameter.detach().to(dtype) for key, parameter in adapter_like().items()}
    config = TrainConfig(learning_rate=0.01, lora_plus_ratio=8, optimizer=name)
    together = {key: nn.Parameter(value.clone()) for key, value in start.items()}
    apart = {key: nn.Parameter(value.clone()) for key, value in start.items()}
    joint = make_optimizer(together, config)
    own = {key: TrainConfig(learning_rate=0.08 if key.endswith("B") else 0.01, optimizer=name) for key in apart}
    single = [make_optimizer({key: parameter}, own[key]) for key, parameter in apart.items()]
    for step in range(3):
        factor = 1 / (step + 1)
        for optimizer in (joint, *single):
            set_learning_rates_(optimizer, factor)
        for key in start:
            for parameter in (together[key], apart[key]):
                parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
        for optimizer in (joint, *single):
            optimizer.step()
    assert all(torch.equal(together[key], apart[key]) for key in start)
    moved = {key: (together[key] - start[key]).abs().mean().item() for key in start}
    assert moved["model.0.lora_B"] == pytest.approx(8 * moved["model.0.lora_A"], rel=0.05)


WITH_ALL = {"modules_to_save": ["norm", "lm_head"], "bias": "all", "trainable_token_indices": [3], "r": 2}


def test_weight_decay_is_of_the_parameters_that_the_trainer_decays(small_model: Any) -> None:
    import peft
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    theirs = peft.get_peft_model(small_model("Qwen2Config"), peft.LoraConfig(target_modules=["q_proj"], **WITH_ALL))
    named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    called = {id(parameter): name for name, parameter in named.items()}
    ours = {name.removesuffix(".default.weight"): parameter for name, parameter in named.items()}
    optimizer = make_optimizer(ours, TrainConfig(learning_rate=0.01, lora_plus_ratio=16, weight_decay=0.1))
    decays = {called[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = set(Trainer.get_decay_parameter_names(None, theirs))
    assert decays == {name: 0.1 if name in expected else 0.0 for name in named}
    assert {name.rpartition("proj.")[2] for name in named if "layers.1" in name and decays[name]} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }
    undecayed = sum(not decay for decay in decays.values())
    assert undecayed == 2 * (3 + 2) + 1  # of each layer three biases and two norms, and the norm before the head
    reference = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
    assert rates(optimizer.param_groups, called) == rates(reference.param_groups, called)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_vectors_do_not_decay_and_matrices_do(name: str) -> None:
    parameters = {"x.lora_A": nn.Parameter(torch.ones(4, 4)), "x.lora_magnitude": nn.Parameter(torch.ones(4))}
    optimizer = make_optimizer(parameters, TrainConfig(learning_rate=0.1, weight_decay=0.5, optimizer=name))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert parameters["x.lora_A"].tolist() == [[pytest.approx(0.95)] * 4] * 4
    assert parameters["x.lora_magnitude"].tolist() == [1.0] * 4


def test_one_rate_is_one_group() -> None:
    assert len(make_optimizer(adapter_like(), TrainConfig()).param_groups) == 1


@pytest.mark.parametrize("ratio", [0.5, float("nan"), True, 1e42])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="lora_plus_ratio must be"):
        TrainConfig(lora_plus_ratio=ratio)


@pytest.mark.parametrize(("name", "dtype"), [("adamw", torch.float32), ("adamw", torch.bfloat16), ("adamw8bit", None)])
def test_states_go_from_one_optimizer_to_another(name: str, dtype: torch.dtype | None) -> None:
    config = TrainConfig(optimizer=name, learning_rate=0.1)
    pairs = []
    for _ in range(2):
        torch.manual_seed(0)
        weights = {f"{n}.lora_A": nn.Parameter(torch.randn(64, 64).to(dtype)) for n in "ab"}
        pairs.append((weights, make_optimizer(weights, config)))

    def step(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
        for weight in weights.values():
            weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
        optimizer.step()

    (one, first), (other, second) = pairs
    step(one, first, 1)
    tensors, plain = optimizer_state(first, one)
    copies = {key: value.clone() for key, value in tensors.items()}
    with torch.no_grad():
        for key, weight in other.items():
            weight.copy_(one[key])
    load_optimizer_state_(second, other, copies, plain)
    for seed in (2, 3):
        step(one, first, seed)
        step(other, second, seed)
    assert all(torch.equal(one[key], other[key]) for key in one)
    if name == "adamw8bit":  # the tables are one for all, before and after
        assert plain["b.lora_A.qmap1"] == {"same_as": "a.lora_A.qmap1"}
        assert second.state[other["a.lora_A"]]["qmap1"] is second.state[other["b.lora_A"]]["qmap1"]
    with pytest.raises(CheckpointError, match="but the model has no parameter b"):
        load_optimizer_state_(second, {"a.lora_A": other["a.lora_A"]}, copies, plain)
