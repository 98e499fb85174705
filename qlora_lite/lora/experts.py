"""Turns stacks of experts' matrices into modules that an adapter can be put around, and back.

A packed stack is a module already. An unpacked one is a parameter of transformers' experts module, which reads it as a
whole: an adapter cannot be put around it, and the update would have to be computed for all experts in every step.
Where a stack is adapted, `RoutedExperts` (quantization/experts.py) therefore replaces that module and multiplies each
expert's matrix and its A and B separately. Removing the adapter restores transformers' module.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from qlora_lite.lora.kinds import Kind, RouterKind, StackKind, kind_of
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.quantization.experts import DenseStack, RoutedExperts, packable_stacks
from qlora_lite.surgery import exchange_modules_


def unpacked_stacks(model: nn.Module) -> dict[str, DenseStack]:
    """Returns every unpacked stack that has no adapter, by every name that it has, as a new module around it."""
    return {
        f"{path}.{name}" if path else name: DenseStack(module._parameters[name], bool(module.is_transposed))
        for path, module in model.named_modules(remove_duplicate=False)
        for name in packable_stacks(module)
    }


def _kind(module: nn.Module) -> Kind | None:
    return module.kind if isinstance(module, LoraLayer) else kind_of(module)


def adaptable_stacks(model: nn.Module) -> set[str]:
    """Returns the names of the stacks that have an adapter or could get one."""
    modules = {name for name, module in model.named_modules() if isinstance(_kind(module), StackKind)}
    return {name for name in modules if not name.endswith(".base_layer")} | unpacked_stacks(model).keys()


def router_names(model: nn.Module) -> set[str]:
    """Returns the names of the routers of experts, with an adapter or without."""
    names = {name for name, module in model.named_modules() if isinstance(_kind(module), RouterKind)}
    return {name for name in names if not name.endswith(".base_layer")}


def wrap_stacks_(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Puts the stacks among these layers (`unpacked_stacks`) in place of their parameters; other layers are ignored.

    The model computes what it did before.
    """
    for path, module in list(model.named_modules()):
        found = {name: layers.get(f"{path}.{name}" if path else name) for name in packable_stacks(module)}
        stacks = {name: stack for name, stack in found.items() if isinstance(stack, DenseStack)}
        if not stacks:
            continue
        routed = module if isinstance(module, RoutedExperts) else RoutedExperts(module)
        if routed is not module:
            exchange_modules_(model, {id(module): routed})
        for name, stack in stacks.items():
            routed.hold_(name, stack)


def unwrap_stacks_(model: nn.Module) -> None:
    """Restores transformers' experts modules where no stack is packed or adapted any more."""
    for module in list(model.modules()):
        plain = module.as_plain() if isinstance(module, RoutedExperts) else None
        if plain is not None:
            exchange_modules_(model, {id(module): plain})
