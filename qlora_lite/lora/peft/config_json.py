"""The layers of a model that have adapters, in the words of peft's configuration: what most have, and who differs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from qlora_lite.errors import ConfigError, listing
from qlora_lite.lora.config import ALL_LINEAR
from qlora_lite.lora.experts import adaptable_stacks, patterned_name, routers_among, stacks_among
from qlora_lite.lora.kinds import kind_of
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.lora.variants import VARIANTS, ordinary_alpha, ordinary_rank, peft_options
from qlora_lite.surgery import answers_to

# peft 0.21's reading of the number of a block (tuners_utils.py, check_target_module_exists): without a pattern the
# name of the list must have a part before it, with one it may stand at the start.
ANY_BLOCK = r".*?\.[^.]*\.(?P<number>\d+)\."
NAMED_BLOCK = r"(?:^|.*?\.){pattern}\.(?P<number>\d+)\."


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
    shared = {(layer.dropout, layer.use_rslora, layer.variant.name) for layer in layers.values()}
    if len(shared) != 1:
        raise ConfigError(
            f"adapters in one file have the same dropout, use_rslora and variant; got (dropout, use_rslora, variant) "
            f"{sorted(shared)}"
        )
    ((dropout, use_rslora, variant),) = shared
    called = {name: patterned_name(name, layer) for name, layer in layers.items()}
    rank, rank_pattern = _usual_and_patterns({called[n]: ordinary_rank(layer) for n, layer in layers.items()}, model)
    alpha, alpha_pattern = _usual_and_patterns({called[n]: ordinary_alpha(layer) for n, layer in layers.items()}, model)
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
        "use_rslora": use_rslora,
        **peft_options(VARIANTS[variant]),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": _target_modules({name: layers[name] for name in linear}, model),
        "target_parameters": parameters or None,
        # Says that weights lie as (in, out); which layers that is true of, each layer says itself.
        "fan_in_fan_out": any(layers[name].stored_transposed for name in linear),
        "inference_mode": True,
    }


def _in_blocks(name: str, numbers: int | list[int], patterns: str | list[str] | None) -> bool:
    listed = [patterns] if isinstance(patterns, str) else patterns
    readings = [NAMED_BLOCK.format(pattern=pattern) for pattern in listed or []] or [ANY_BLOCK]
    found = next((match for reading in readings if (match := re.match(reading, name))), None)
    return found is not None and int(found["number"]) in ([numbers] if isinstance(numbers, int) else numbers)


def _answering(names: Iterable[str], targets: str | list[str]) -> set[str]:
    if isinstance(targets, str):
        return {name for name in names if re.fullmatch(targets, name)}
    return {name for name in names if any(answers_to(name, target) for target in targets)}


def _unreadable(config: dict[str, Any]) -> list[str]:
    """A sentence for each of the options about layers that is of no form that peft knows."""
    problems = []
    for option in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(option)
        listed = value if isinstance(value, list) else ["" if value is None else value]
        if not all(isinstance(name, str) for name in listed):
            problems.append(f"{option} must be a list of names or a regular expression; got {value!r}")
        patterns = listed if option == "layers_pattern" or isinstance(value, str) else []
        try:
            for pattern in filter(None, patterns if not problems else []):
                re.compile(pattern)
        except re.error as error:
            problems.append(f"{option} {value!r} is not a regular expression: {error}")
    numbers = config.get("layers_to_transform")
    if not all(
        isinstance(n, int) for n in (numbers if isinstance(numbers, list) else [0 if numbers is None else numbers])
    ):
        problems.append(f"layers_to_transform must be a number or a list of numbers; got {numbers!r}")
    return problems


def peft_meaning(config: dict[str, Any], names: Iterable[str]) -> set[str]:
    """Those of these layers that peft adapts: target_modules, a list or a regular expression, less the excluded ones.

    layers_to_transform narrows a list only, and not what it names in full.
    """
    targets: str | list[str] = config["target_modules"]
    exclude, numbers = config.get("exclude_modules"), config.get("layers_to_transform")
    names = set(names)
    meant = _answering(names, targets)
    if isinstance(targets, list) and numbers not in (None, []):
        patterns = config.get("layers_pattern")
        meant = {name for name in meant if name in targets or _in_blocks(name, numbers, patterns)}
    return meant - (_answering(names, exclude) if exclude else set())


def target_problems(model: nn.Module, in_file: Collection[str], config: dict[str, Any]) -> list[str]:
    """What the configuration targets and the file has nothing for (part of the adapter is lost), and the reverse."""
    targets = config.get("target_modules")
    if problems := _unreadable(config):
        return problems
    if targets in (None, [], ALL_LINEAR):
        return []
    modules = dict(model.named_modules())
    answering = _answering(in_file, targets)
    if not answering and isinstance(targets, str):
        return [f"target_modules {targets!r} matches no layer in the file"]
    if isinstance(targets, list):
        unmet = [t for t in targets if not any(answers_to(n, t) for n in in_file)]
        # peft keeps targets that other models have, as long as this one has some.
        wanted = peft_meaning(config, modules)
        if lost := [t for t in unmet if unmet == targets or any(answers_to(n, t) for n in wanted)]:
            return [f"target_modules {lost} answer to no layer in the file"]
    # Stacks and routers are what target_parameters means; a router was a linear layer in older releases' models.
    others = adaptable_stacks(model).union(routers_among(modules)).difference(in_file)
    meant = peft_meaning(config, adaptable_names(model) - others)
    problems = [_told(meant - set(in_file), "targeted layers have nothing in the file")]
    # Only of those that target_modules names: what else there is, files with tied weights have beside them.
    problems.append(
        _told(answering - meant, "layers in the file are left out by exclude_modules or layers_to_transform")
    )
    return [problem for problem in problems if problem]


def _told(names: set[str], what: str) -> str:
    shown = listing(sorted(names), 4)
    return f"{len(names)} {what}: {shown}" if names else ""
