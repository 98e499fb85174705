"""The layers that peft adapts with target_modules, exclude_modules, layers_to_transform and target_parameters.

An adapter's tensors name its layers. The configuration names them a second time: layers that it selects and the file
lacks have been lost, and layers that it leaves out would not be loaded by peft.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import nn

from qlora_lite.errors import CheckpointError, listing
from qlora_lite.lora.config import ALL_LINEAR
from qlora_lite.lora.experts import adaptable_stacks, router_names
from qlora_lite.lora.peft.options import target_parameters
from qlora_lite.lora.targets import adaptable_names
from qlora_lite.surgery import name_matches

# How peft 0.21 finds a block's number (tuners_utils.py, check_target_module_exists): without layers_pattern, the name
# of the list of blocks must have a part before it; with one, it may start the name.
ANY_BLOCK = r".*?\.[^.]*\.(?P<number>\d+)\."
NAMED_BLOCK = r"(?:^|.*?\.){pattern}\.(?P<number>\d+)\."


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _matching(names: Iterable[str], targets: object) -> set[str]:
    """Returns the names that a regular expression or a list of names selects."""
    if isinstance(targets, str):
        return {name for name in names if re.fullmatch(targets, name)}
    return {name for name in names if any(name_matches(name, str(target)) for target in _as_list(targets))}


def _in_blocks(name: str, numbers: object, patterns: object) -> bool:
    listed = [] if patterns is None else _as_list(patterns)
    expressions = [NAMED_BLOCK.format(pattern=pattern) for pattern in listed] or [ANY_BLOCK]
    found = next((match for expression in expressions if (match := re.match(expression, name))), None)
    return found is not None and int(found["number"]) in _as_list(numbers)


def _malformed_options(config: Mapping[str, object]) -> list[str]:
    """Returns a sentence for each option that selects layers and has a value of a type that peft does not take."""
    problems: list[str] = []
    for option in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(option)
        listed = _as_list("" if value is None else value)
        if not all(isinstance(name, str) for name in listed):
            problems.append(f"{option} must be a list of names or a regular expression; got {value!r}")
        patterns = listed if option == "layers_pattern" or isinstance(value, str) else []
        try:
            for pattern in filter(None, patterns if not problems else []):
                re.compile(str(pattern))
        except re.error as error:
            problems.append(f"{option} {value!r} is not a regular expression: {error}")
    numbers = config.get("layers_to_transform")
    if not all(isinstance(number, int) for number in _as_list(0 if numbers is None else numbers)):
        problems.append(f"layers_to_transform must be a number or a list of numbers; got {numbers!r}")
    return problems


def layers_peft_adapts(config: Mapping[str, object], names: Iterable[str]) -> set[str]:
    """Returns those of these layers that peft adapts: target_modules, a list or an expression, minus exclude_modules.

    layers_to_transform narrows a list only, and not its entries that are a layer's whole name.
    """
    targets, exclude, numbers = (
        config.get(key) for key in ("target_modules", "exclude_modules", "layers_to_transform")
    )
    names = set(names)
    targeted = _matching(names, targets)
    if isinstance(targets, list) and numbers not in (None, []):
        patterns = config.get("layers_pattern")
        targeted = {name for name in targeted if name in targets or _in_blocks(name, numbers, patterns)}
    return targeted - (_matching(names, exclude) if exclude else set())


def target_problems(model: nn.Module, in_file: Collection[str], config: Mapping[str, object]) -> list[str]:
    """Returns a sentence for each disagreement between the targets of the configuration and the layers in the file."""
    targets = config.get("target_modules")
    if problems := _malformed_options(config):
        return problems
    if targets in (None, [], ALL_LINEAR):
        return []
    matched = _matching(in_file, targets)
    if not matched and isinstance(targets, str):
        return [f"target_modules {targets!r} matches no layer in the file"]
    if isinstance(targets, list):
        unmatched = [t for t in targets if not any(name_matches(n, t) for n in in_file)]
        # peft keeps targets that only other models have, as long as this model has some.
        wanted = layers_peft_adapts(config, dict(model.named_modules()))
        if lost := [t for t in unmatched if unmatched == targets or any(name_matches(n, t) for n in wanted)]:
            return [f"target_modules {lost} match no layer in the file"]
    # target_parameters selects stacks and routers; in the models of older releases a router was a linear layer.
    others = (adaptable_stacks(model) | router_names(model)).difference(in_file)
    selected = layers_peft_adapts(config, adaptable_names(model) - others)
    problems = [_counted(selected - set(in_file), "targeted layers have no tensors in the file")]
    # Only layers that target_modules matches: files with tied weights contain others.
    problems.append(
        _counted(matched - selected, "layers in the file are left out by exclude_modules or layers_to_transform")
    )
    return [problem for problem in problems if problem]


def _counted(names: set[str], what: str) -> str:
    return f"{len(names)} {what}: {listing(sorted(names), 4)}" if names else ""


def targeted_parameters(model: nn.Module, config: Mapping[str, object], path: Path) -> list[str]:
    """Returns the names of the stacks and routers that target_parameters selects.

    Raises CheckpointError for an entry that selects none; path: the file that the error names.
    """
    targets = target_parameters(config, path)
    routers = {f"{name}.weight": name for name in router_names(model)}
    known = routers | {name: name for name in adaptable_stacks(model)}
    if unmatched := [target for target in targets if not any(name_matches(name, target) for name in known)]:
        raise CheckpointError(
            f"{path}: target_parameters {unmatched} match no stack of experts and no router of this model"
        )
    return sorted(name for key, name in known.items() if any(name_matches(key, target) for target in targets))
