"""Stacks of experts' matrices as layers that can be adapted: found, put under a module of their own, and put back.

A packed stack is a module already. An unpacked one is a parameter of transformers' experts module, which reads it
whole: an adapter cannot stand around it, and what it adds would have to be made for all experts in every step. So where
a stack is adapted, `RoutedExperts` takes the place of that module (experts.py), and each expert's matrix is multiplied
beside its own A and B; when the adapter is removed, transformers' module comes back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from qlora_lite.lora.kinds import Kind, RouterKind, StackKind, kind_of
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.quantization.experts import DenseStack, RoutedExperts, packable_stacks
from qlora_lite.surgery import exchange_modules_


def open_stacks(model: nn.Module) -> dict[str, DenseStack]:
    """Every unpacked stack without an adapter, by every name it has, as the module that it would become."""
    return {
        f"{path}.{name}" if path else name: DenseStack(module._parameters[name], bool(module.is_transposed))
        for path, module in model.named_modules(remove_duplicate=False)
        for name in packable_stacks(module)
    }


def _kind(module: nn.Module) -> Kind | None:
    return module.kind if isinstance(module, LoraLayer) else kind_of(module)


def kinds_of(layers: Mapping[str, nn.Module]) -> dict[str, Kind | None]:
    """The kind of each layer, adapted or not, by name."""
    return {name: _kind(layer) for name, layer in layers.items()}


def is_stack_layer(module: nn.Module) -> bool:
    """Whether this is a stack of experts' matrices, be it with an adapter or without."""
    return isinstance(_kind(module), StackKind)


def is_router_layer(module: nn.Module) -> bool:
    """Whether this is a router of experts, be it with an adapter or without."""
    return isinstance(_kind(module), RouterKind)


def adaptable_stacks(model: nn.Module) -> set[str]:
    """Names of the stacks that have an adapter or could get one."""
    held = {name for name, module in model.named_modules() if is_stack_layer(module)}
    return {name for name in held if not name.endswith(".base_layer")} | open_stacks(model).keys()


def hold_stacks_(model: nn.Module, names: Collection[str]) -> None:
    """Makes modules of those of these unpacked stacks that are parameters; the model computes what it did."""
    for path, module in list(model.named_modules()):
        meant = [name for name in packable_stacks(module) if (f"{path}.{name}" if path else name) in names]
        if not meant:
            continue
        routed = module if isinstance(module, RoutedExperts) else RoutedExperts(module)
        if routed is not module:
            exchange_modules_(model, {id(module): routed})
        for name in meant:
            routed.hold_(name, DenseStack(getattr(routed, name), routed.is_transposed))


def plain_again_(model: nn.Module) -> None:
    """Puts transformers' experts modules back where nothing in them is packed or adapted any more."""
    for module in list(model.modules()):
        plain = module.plain_again() if isinstance(module, RoutedExperts) else None
        if plain is not None:
            exchange_modules_(model, {id(module): plain})


def stacks_among(layers: Mapping[str, nn.Module]) -> list[str]:
    """Names of the stacks among these layers, adapted or not."""
    return [name for name, layer in layers.items() if is_stack_layer(layer)]


def routers_among(layers: Mapping[str, nn.Module]) -> list[str]:
    """Names of the routers among these layers, adapted or not."""
    return [name for name, layer in layers.items() if is_router_layer(layer)]


def patterned_name(name: str, layer: nn.Module) -> str:
    """What peft's rank_pattern, alpha_pattern and target_parameters call this layer: a router by its weight."""
    return f"{name}.weight" if is_router_layer(layer) else name
