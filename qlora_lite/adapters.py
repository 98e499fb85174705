"""Verbs on a model's adapters: add, remove, freeze what is beside them, list them, switch them off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qlora_lite.config import LoraConfig
from qlora_lite.errors import TargetError
from qlora_lite.initial import check_start, originals_of, start_
from qlora_lite.lora import LoraLayer
from qlora_lite.modules import replace_modules_
from qlora_lite.targets import select_targets


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Every LoraLayer of the model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every LoraLayer by name, and DoRA's magnitudes."""
    return {
        f"{name}.{part}" if name else part: getattr(layer, part)
        for name, layer in lora_layers(model).items()
        for part in ("lora_A", "lora_B", "lora_magnitude")
        if getattr(layer, part) is not None
    }


def freeze_base_(model: nn.Module) -> None:
    """Lets gradients go to A and B of the LoraLayers and to nothing else."""
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
        rslora=config.rslora,
        variant=config.variant,
    )
    return wrapped.train(layer.training)


def add_lora_(model: nn.Module, config: LoraConfig) -> list[str]:
    """Puts a LoraLayer around every targeted layer, freezes all else, and returns the names of the adapted layers.

    The model computes what it did before; with init `loftq` what it did before it was packed, more nearly. Raises
    TargetError for targets that match nothing or are adapted already, and for exclusions, layer numbers and patterns
    that decide nothing;
    ConfigError, CheckpointError for layers that cannot start as `config.init` says. The model is then as it was.
    """
    if there := lora_layers(model):
        raise TargetError(f"{len(there)} layers have adapters already; remove_lora_ drops them")
    chosen = set(select_targets(model, config))
    # A layer that has several names is adapted under its first.
    targets = {name: module for name, module in model.named_modules() if name in chosen}
    if idle := config.idle_patterns(targets):
        raise TargetError("; ".join(idle))
    check_start(targets, config)
    originals = originals_of(model, targets, config.init)

    def make(name: str, layer: nn.Module) -> nn.Module | None:
        if name not in chosen:
            return None
        return adapted(name, layer, config, config.adapter_dtype)

    added = replace_modules_(model, make)
    for name, layer in lora_layers(model).items():
        start_(layer, name, config.init, originals)
    freeze_base_(model)
    return added


def remove_lora_(model: nn.Module) -> list[str]:
    """Puts the base layers back in place of the LoraLayers, A and B are dropped; returns the names of the layers."""
    return replace_modules_(model, lambda name, layer: layer.base_layer if isinstance(layer, LoraLayer) else None)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what its base does, merged or not; afterwards each layer is as it was."""
    before = {layer: layer.adapter_enabled for layer in lora_layers(model).values()}
    for layer in before:
        layer.adapter_enabled = False
    try:
        yield
    finally:
        for layer, enabled in before.items():
            layer.adapter_enabled = enabled
