"""Adapters on stacks of experts in peft's files: under which keys they lie, and in which layout.

peft (`target_parameters`) wraps an experts module once for each of its stacks, the one that the module declares first
innermost. So the key of a stack's matrices says how deep its wrapper is, `….experts.base_layer.lora_A.weight`, and not
which stack it is; that follows from the stacks that the configuration targets.

    A  here (experts, rank, in)    there (experts * rank, in)     the experts one after the other
    B  here (experts, out, rank)   there (out, rank * experts)    column rank * experts + expert: interleaved
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qlora_lite.errors import CheckpointError
from qlora_lite.lora.experts import adaptable_stacks, patterned_name, routers_among
from qlora_lite.lora.peft.keys import parameter_targets
from qlora_lite.quantization.experts import RoutedExperts
from qlora_lite.surgery import answers_to

WRAPPED = ".base_layer"


def _declared(module: nn.Module) -> list[str]:
    """The stacks of an experts module in the order in which transformers' declares them."""
    return list(module.stack_names) if isinstance(module, RoutedExperts) else list(module._parameters)


def places_in_files(model: nn.Module, stacks: Iterable[str]) -> dict[str, str]:
    """{stack: the module that peft's keys name for it}, if exactly these stacks of the model are adapted."""
    held: dict[str, list[str]] = {}
    for name in stacks:
        held.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    places = {}
    for owner, names in held.items():
        inner_first = [name for name in _declared(model.get_submodule(owner)) if name in names]
        for depth, name in enumerate(reversed(inner_first)):
            places[f"{owner}.{name}"] = owner + WRAPPED * depth
    return places


def targeted_parameters(model: nn.Module, config: dict[str, Any], path: Path) -> list[str]:
    """The stacks and routers that a configuration's target_parameters mean. CheckpointError for one that means none."""
    targets = parameter_targets(config, path)
    modules = {name: module for name, module in model.named_modules() if not name.endswith(WRAPPED)}
    routers = {patterned_name(name, modules[name]): name for name in routers_among(modules)}
    known = routers | {name: name for name in adaptable_stacks(model)}
    if lost := [target for target in targets if not any(answers_to(name, target) for name in known)]:
        raise CheckpointError(f"{path}: target_parameters {lost} mean no stack of experts and no router of this model")
    return sorted(name for key, name in known.items() if any(answers_to(key, target) for target in targets))


def matrices_of_A(flat: Tensor, experts: int) -> Tensor:
    """peft's A as `(experts, rank, in)`; as it is where it is not of so many experts."""
    if flat.dim() != 2 or flat.shape[0] % experts:
        return flat
    return flat.reshape(experts, -1, flat.shape[1])


def matrices_of_B(flat: Tensor, experts: int) -> Tensor:
    """peft's B as `(experts, out, rank)`; as it is where it is not of so many experts."""
    if flat.dim() != 2 or flat.shape[1] % experts:
        return flat
    return flat.reshape(flat.shape[0], -1, experts).permute(2, 0, 1).contiguous()


def stack_pairs(
    layers: Mapping[str, Any], pairs: Mapping[str, Mapping[str, Tensor]], places: Mapping[str, str]
) -> dict[str, dict[str, Tensor]]:
    """A and B as read, by the modules of peft's keys, with those of stacks under the stacks' names and by experts."""
    stacks = {place: name for name, place in places.items()}
    found = {}
    for place, pair in pairs.items():
        name, made = stacks.get(place, place), dict(pair)
        if place in stacks:
            experts = layers[name].weight.shape[0]
            made["lora_A"] = matrices_of_A(pair["lora_A"], experts)
            made["lora_B"] = matrices_of_B(pair["lora_B"], experts)
        found[name] = made
    return found


def flat_A(lora_A: Tensor) -> Tensor:
    """`(experts, rank, in)` as peft has it."""
    return lora_A.flatten(0, 1)


def flat_B(lora_B: Tensor) -> Tensor:
    """`(experts, out, rank)` as peft has it."""
    return lora_B.permute(1, 2, 0).flatten(1)
