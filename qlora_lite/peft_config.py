"""The layers of a model that have adapters, in the words of peft's configuration: what most have, and who differs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from qlora_lite.errors import ConfigError
from qlora_lite.lora.experts import adaptable_stacks, patterned_name, routers_among, stacks_among
from qlora_lite.lora.kinds import kind_of
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.surgery import answers_to


def adaptable_names(model: nn.Module) -> set[str]:
    """Names of the layers that have an adapter or could get one."""
    return {
        name
        for name, module in model.named_modules()
        if (isinstance(module, LoraLayer) or kind_of(module) is not None) and not name.endswith(".base_layer")
    } | adaptable_stacks(model)


def _common_ends(names: Iterable[str], model: nn.Module) -> list[str] | None:
    """Last parts of these names if they mean exactly these layers, else None."""
    names = set(names)
    ends = sorted({name.rpartition(".")[2] for name in names})
    meant = {name for name in adaptable_names(model) if any(answers_to(name, end) for end in ends)}
    return ends if meant == names else None


def _target_modules(names: Iterable[str], model: nn.Module) -> list[str] | str:
    """What peft calls exactly these layers: their last parts, their names, or a regular expression of their names.

    peft takes a name for every module that ends with it, one that cannot be adapted included.
    """
    wanted = set(names)
    modules = {name for name, _ in model.named_modules() if "base_layer" not in name.split(".")}
    for listed in (sorted({name.rpartition(".")[2] for name in wanted}), sorted(wanted)):
        if {name for name in modules if any(answers_to(name, target) for target in listed)} == wanted:
            return listed
    return "|".join(map(re.escape, sorted(wanted)))


def _router_weights(names: Collection[str], model: nn.Module) -> list[str]:
    """Names of these routers' weights in target_parameters: their common ends, if no other weight answers to them."""
    ends = sorted({f"{name.rpartition('.')[2]}.weight" for name in names})
    weights = [f"{name}.weight" for name, _ in model.named_modules() if not name.endswith(".base_layer")]
    meant = [weight for weight in weights if any(answers_to(weight, end) for end in ends)]
    return ends if len(meant) == len(names) else sorted(f"{name}.weight" for name in names)


def _usual_and_patterns(numbers: Mapping[str, float], model: nn.Module) -> tuple[float, dict[str, float]]:
    """The number of most layers, and patterns for the others.

    No layer answers to two patterns of different numbers: peft sorts them when it saves, and the first one decides.
    """
    ((usual, _),) = Counter(numbers.values()).most_common(1)
    patterns: dict[str, float] = {}
    for number in sorted(set(numbers.values()) - {usual}):
        names = [name for name, its in numbers.items() if its == number]
        ends = _common_ends(names, model)
        for pattern in [f"^{re.escape(name)}" for name in names] if ends is None else map(re.escape, ends):
            patterns[pattern] = number
    return usual, patterns


def peft_config(model: nn.Module, layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """What peft's adapter_config.json says of these layers. ConfigError for layers that one file cannot hold."""
    shared = {(layer.dropout, layer.rslora, layer.variant) for layer in layers.values()}
    if len(shared) != 1:
        raise ConfigError(
            f"adapters in one file have the same dropout, rslora and variant; got (dropout, rslora, variant) "
            f"{sorted(shared)}"
        )
    ((dropout, rslora, variant),) = shared
    called = {name: patterned_name(name, layer) for name, layer in layers.items()}
    rank, rank_pattern = _usual_and_patterns({called[n]: layer.plain_rank for n, layer in layers.items()}, model)
    alpha, alpha_pattern = _usual_and_patterns({called[n]: layer.plain_alpha for n, layer in layers.items()}, model)
    stacks, routers = stacks_among(layers), routers_among(layers)
    linear = [name for name in layers if name not in stacks and name not in routers]
    parameters = [*(_common_ends(stacks, model) or sorted(stacks)), *_router_weights(routers, model)]
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "base_model_name_or_path": source or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": variant == "dora",
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": _target_modules({name: layers[name] for name in linear}, model),
        "target_parameters": parameters or None,
        # Says that weights lie as (in, out); which layers that is true of, each layer says itself.
        "fan_in_fan_out": any(layers[name].stored_transposed for name in linear),
        "inference_mode": True,
    }
