"""Verbs on a model's adapters: add, remove, freeze what is beside them, list them, switch them off for a while."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.lora.auxiliary import WRAPPERS, Beside, beside_parameters, left_of
from qlora_lite.lora.auxiliary_layers import TrainedCopy, WithTokenRows
from qlora_lite.lora.config import LoraConfig
from qlora_lite.lora.experts import hold_stacks_, kinds_of, open_stacks, plain_again_
from qlora_lite.lora.init import check_start, originals_of, start_
from qlora_lite.lora.layer import DEFAULT_ADAPTER, LoraLayer
from qlora_lite.lora.targets import select_targets
from qlora_lite.lora.variants import VARIANTS, combination_problems
from qlora_lite.surgery import replace_modules_

ATTRIBUTE = "parked_adapters"
Layers = dict[str, Any]


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Every LoraLayer of the model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All that is trained, by name: the parameters of every LoraLayer, and what is trained beside them."""
    adapters = {
        f"{name}.{part}" if name else part: parameter
        for name, layer in lora_layers(model).items()
        for part, parameter in layer.lora_parameters.items()
    }
    return adapters | beside_parameters(model)


def freeze_base_(model: nn.Module) -> None:
    """Lets gradients go to what `adapter_parameters` gives and to nothing else."""
    model.requires_grad_(False)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)


def adapted(name: str, layer: nn.Module, config: LoraConfig, dtype: torch.dtype) -> LoraLayer:
    """A LoraLayer around the layer of this name: of the rank and alpha that are its own, in the layer's mode."""
    wrapped = LoraLayer(
        config.rank_of(name),
        config.alpha_of(name),
        layer,
        dropout=config.dropout,
        adapter_dtype=dtype,
        use_rslora=config.use_rslora,
        variant=config.variant,
    )
    return wrapped.train(layer.training)


def add_lora_(model: nn.Module, config: LoraConfig, name: str = DEFAULT_ADAPTER) -> list[str]:
    """Puts a LoraLayer around every targeted layer, freezes all else, and returns the names of the adapted layers.

    What is to be trained beside A and B (modules_to_save, bias, trainable_token_indices) gets trained copies beside
    its originals.
    The model computes what it did before; with init `loftq` what it did before it was packed, more nearly. `loftq:N`
    also puts newly packed weights in the place of the targeted layers' own, one layer at a time, before its adapter
    stands on it: the one case in which a base is exchanged. `save_quantized` after `remove_lora_` keeps it. Raises
    TargetError for targets that match nothing or are adapted already, and for exclusions, layer numbers and patterns
    that decide nothing;
    ConfigError, CheckpointError for layers that cannot start as `config.init_lora_weights` says. The model is then
    as it was.
    name: what the adapter is called; `named_adapters.add_adapter_` puts a further one beside those that are there.
    """
    check_name(model, name)
    if there := lora_layers(model):
        raise TargetError(f"{len(there)} layers have adapters already; remove_lora_ drops them")
    chosen = left_of(set(select_targets(model, config)), model, config)
    # A layer that has several names is adapted under its first.
    everything = dict(model.named_modules()) | open_stacks(model)
    targets = {name: module for name, module in everything.items() if name in chosen}
    if idle := config.idle_patterns(targets):
        raise TargetError("; ".join(idle))
    if problems := combination_problems(kinds_of(targets), config.dropout, VARIANTS[config.variant]):
        raise ConfigError(problems[0])
    check_start(model, targets, config)
    beside = Beside.of(model, config, set(targets))
    originals = originals_of(model, targets, config.init_lora_weights)

    def make(name: str, layer: nn.Module) -> nn.Module | None:
        if name not in chosen:
            return beside.wrapped(name, layer)
        return adapted(name, layer, config, config.adapter_dtype)

    hold_stacks_(model, targets)
    added = [path for path in replace_modules_(model, make) if path in chosen]
    beside.train_biases_(lora_layers(model))
    for path, layer in lora_layers(model).items():
        start_(layer, path, config.init_lora_weights, originals)
        layer.adapter_name = name
    freeze_base_(model)
    return added


def remove_lora_(model: nn.Module) -> list[str]:
    """Puts the base layers back, and drops all that was trained; returns the names of the layers that had A and B.

    A and B of every adapter are dropped (`named_adapters.delete_adapter_` drops one of several).
    """
    unpark_(model, *parked(model))
    removed = bare_(model)
    plain_again_(model)
    return removed


def bare_(model: nn.Module) -> list[str]:
    """Puts the base layers back in place of all that is trained; returns the names of those that had A and B."""
    layers = lora_layers(model)
    put_back = replace_modules_(model, lambda name, layer: layer.base_layer if isinstance(layer, WRAPPERS) else None)
    return [name for name in put_back if name in layers]


def switched(model: nn.Module) -> dict[str, LoraLayer | TrainedCopy | WithTokenRows]:
    """Every module that computes with adapters or without, as its `adapter_enabled` says, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WRAPPERS)}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what its base does, merged or not; afterwards each layer is as it was."""
    before = {layer: layer.adapter_enabled for layer in switched(model).values()}
    for layer in before:
        layer.adapter_enabled = False
    try:
        yield
    finally:
        for layer, enabled in before.items():
            layer.adapter_enabled = enabled


class ParkedAdapters(nn.Module):
    """{adapter: {layer: its LoraLayer}}, which `parameters`, `state_dict` and `named_modules` do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, Layers] = {}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ParkedAdapters:
        """What `Module.to` and its like go through."""
        super()._apply(fn, recurse)
        for layers in self.adapters.values():
            for layer in layers.values():
                # A base that is there for the moment has its own place in the model.
                layer._apply(fn, recurse=False)
        return self


def parked(model: nn.Module) -> dict[str, Layers]:
    """The parked adapters of a model by name, each as {layer: LoraLayer without a base}."""
    holder = getattr(model, ATTRIBUTE, None)
    return dict(holder.adapters) if isinstance(holder, ParkedAdapters) else {}


def park_(model: nn.Module, name: str, layers: Layers) -> None:
    """Keeps these layers as the adapter of this name."""
    if not isinstance(getattr(model, ATTRIBUTE, None), ParkedAdapters):
        model.add_module(ATTRIBUTE, ParkedAdapters())
    getattr(model, ATTRIBUTE).adapters[name] = layers


def unpark_(model: nn.Module, *names: str) -> None:
    """Lets go of the adapters of these names."""
    holder = getattr(model, ATTRIBUTE, None)
    for name in names:
        del holder.adapters[name]  # type: ignore[union-attr]
    if isinstance(holder, ParkedAdapters) and not holder.adapters:
        delattr(model, ATTRIBUTE)


def check_name(model: nn.Module, name: str) -> None:
    """ConfigError for what is no name of an adapter, TargetError if a parked one has it."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(f"an adapter's name must be of letters, digits, _ and -; got {name!r}")
    if name in parked(model):
        raise TargetError(
            f"the model keeps an adapter named {name!r} already; add or load the new one under another name, "
            f"or delete_adapter_ drops the old one"
        )
