"""Verbs on a model's adapters: add, remove, freeze what is beside them, list them, switch them off for a while."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qlora_lite.config import ALL_LINEAR, LoraConfig, Targets
from qlora_lite.errors import TargetError
from qlora_lite.experts import stacks
from qlora_lite.initial import check_start, originals_of, start_
from qlora_lite.layer_kinds import LinearKind, kind_of
from qlora_lite.lora import LoraLayer
from qlora_lite.modules import answers_to, check_all_matched, has_own_forward, replace_modules_


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


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that could get an adapter, by every name they have."""
    inside = tuple(f"{name}." for name in lora_layers(model))
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if not name.startswith(inside or ("\n",)) and not isinstance(module, LoraLayer) and kind_of(module) is not None
    }


def _check_no_linear_is_left_out(model: nn.Module, head: nn.Module | None) -> None:
    own = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and has_own_forward(m) and m is not head}
    if own:
        shown = ", ".join(f"{name} ({type(module).__name__})" for name, module in list(own.items())[:4])
        raise TargetError(f"all-linear meets {len(own)} layers with a forward of their own, {shown}; name the others")


def _check_no_stack_is_meant(model: nn.Module, targets: Targets) -> None:
    names = [] if isinstance(targets, str) or callable(targets) else list(targets)
    meant = [name for name in stacks(model) if any(answers_to(name, target) for target in names)]
    if meant:
        raise TargetError(f"{', '.join(meant[:4])}: stacks of experts cannot be adapted; leave them out")


def _check_called(model: nn.Module, names: list[str]) -> None:
    """An adapter in a layer that its parent does not call would be ignored."""
    fast = [n for n in names if isinstance(model.get_submodule(n.rpartition(".")[0]), nn.TransformerEncoderLayer)]
    if fast:
        raise TargetError(
            f"{', '.join(fast[:4])}: in eval, nn.TransformerEncoderLayer reads its layers' weights instead of calling "
            f"them, which would leave an adapter out; leave them out of target_modules"
        )


def select_targets(model: nn.Module, targets: Targets) -> list[str]:
    """Names of the layers that `targets` means (see LoraConfig). TargetError lists what matched nothing."""
    layers = _adaptable(model)
    ask_head = getattr(model, "get_output_embeddings", None)
    head = ask_head() if callable(ask_head) else None
    if adapted := lora_layers(model):
        raise TargetError(f"{len(adapted)} layers have adapters already; remove_lora_ drops them")
    _check_no_stack_is_meant(model, targets)
    if targets == ALL_LINEAR:
        _check_no_linear_is_left_out(model, head)
        chosen = [
            name for name, layer in layers.items() if isinstance(kind_of(layer), LinearKind) and layer is not head
        ]
    elif isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(f"target_modules {targets!r} is not a regular expression: {error}") from error
        chosen = [name for name in layers if pattern.fullmatch(name)]
    elif callable(targets):
        chosen = [name for name, layer in layers.items() if targets(name, layer)]
    else:
        check_all_matched("target_modules", targets, layers)
        chosen = [name for name in layers if any(answers_to(name, target) for target in targets)]
    _check_called(model, chosen)
    if not chosen:
        check_all_matched("target_modules", [str(targets)], layers)
        raise TargetError(f"target_modules {targets!r} matched no layer")
    return chosen


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

    The model computes what it did before; with init `loftq` what it did before it was packed, more nearly. `loftq:N`
    also puts newly packed weights in the place of the targeted layers' own, one layer at a time, before its adapter
    stands on it: the one case in which a base is exchanged. `save_quantized` after `remove_lora_` keeps it. Raises
    TargetError for targets that match nothing or are adapted already, and for patterns that decide for none of them;
    ConfigError, CheckpointError for layers that cannot start as `config.init` says. The model is then as it was.
    """
    chosen = set(select_targets(model, config.target_modules))
    # A layer that has several names is adapted under its first.
    targets = {name: module for name, module in model.named_modules() if name in chosen}
    if idle := config.idle_patterns(targets):
        raise TargetError("; ".join(idle))
    check_start(model, targets, config)
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
