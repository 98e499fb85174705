"""Which layers an adapter_config.json means, as peft reads it, beside those that its file has something for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from qlora_lite.lora.config import ALL_LINEAR
from qlora_lite.lora.experts import adaptable_stacks, routers_among
from qlora_lite.peft_config import adaptable_names
from qlora_lite.surgery import answers_to

# peft 0.21's reading of the number of a block (tuners_utils.py, check_target_module_exists): without a pattern the
# name of the list must have a part before it, with one it may stand at the start.
ANY_BLOCK = r".*?\.[^.]*\.(?P<number>\d+)\."
NAMED_BLOCK = r"(?:^|.*?\.){pattern}\.(?P<number>\d+)\."


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
    shown = ", ".join(sorted(names)[:4]) + (" …" if len(names) > 4 else "")
    return f"{len(names)} {what}: {shown}" if names else ""
