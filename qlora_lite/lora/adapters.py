"""Adds, removes, lists and switches off the adapter of a model, and stores the adapters that are not in use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.lora.auxiliary import WRAPPERS, AuxiliaryTargets, auxiliary_parameters
from qlora_lite.lora.auxiliary_layers import TrainableTokensLayer, TrainedCopy
from qlora_lite.lora.config import LoraConfig, parse_init
from qlora_lite.lora.experts import unwrap_stacks_, wrap_stacks_
from qlora_lite.lora.init import check_initialization, checkpoint_weights, initialize_
from qlora_lite.lora.layer import DEFAULT_ADAPTER, LoraLayer
from qlora_lite.lora.targets import TargetedLayer, select_targets
from qlora_lite.lora.variants import VARIANTS, combination_problems
from qlora_lite.progress.work import working
from qlora_lite.sharding.base import check_whole
from qlora_lite.surgery import replace_modules_
from qlora_lite.tasks import trained_whole

# The attribute of a model that holds its inactive adapters.
ATTRIBUTE = "inactive_adapters"
Layers = dict[str, LoraLayer]


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Returns every LoraLayer of the model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns every trained parameter by name: those of every LoraLayer and the auxiliary ones (auxiliary.py)."""
    adapters = {
        f"{name}.{part}" if name else part: parameter
        for name, layer in lora_layers(model).items()
        for part, parameter in layer.lora_parameters.items()
    }
    return adapters | auxiliary_parameters(model)


def freeze_base_(model: nn.Module) -> None:
    """Sets requires_grad for the parameters that `adapter_parameters` returns, and clears it for all others."""
    model.requires_grad_(False)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)


def wrap_layer(layer: TargetedLayer, config: LoraConfig, dtype: torch.dtype) -> LoraLayer:
    """Returns a LoraLayer around this layer, in its training mode. dtype: that of A and B."""
    wrapped = LoraLayer(
        layer.rank,
        layer.alpha,
        layer.module,
        dropout=config.dropout,
        adapter_dtype=dtype,
        use_rslora=config.use_rslora,
        variant=config.variant,
    )
    return wrapped.train(layer.module.training)


def add_lora_(model: nn.Module, config: LoraConfig, name: str = DEFAULT_ADAPTER) -> list[str]:
    """Puts a LoraLayer around every targeted layer and freezes everything else; returns the names of those layers.

    The parameters that modules_to_save, bias and trainable_token_indices select get trained copies, and so does the
    head of a classifier, which modules_to_save need not name; the originals stay frozen. The model computes what it did
    before; with init_lora_weights `loftq`, the outputs move towards those of the unpacked base. `loftq:N` also replaces
    the packed weights of the targeted layers, one layer at a time, before the adapter is put around each. It is the
    only setting that changes a base; `save_quantized` after `remove_lora_` writes that base.

    name: the adapter's name; `multi_adapter.add_adapter_` adds a further adapter to a model that has one.

    Raises TargetError if the model is adapted already, and for targets, exclusions, block numbers and patterns that
    have no effect; ConfigError or CheckpointError for layers that `config.init_lora_weights` cannot initialize. The
    model is then unchanged.
    """
    check_adapter_name(model, name)
    if present := lora_layers(model):
        raise TargetError(f"{len(present)} layers have adapters already; remove_lora_ removes them")
    config = replace(config, modules_to_save=tuple(dict.fromkeys([*config.modules_to_save, *trained_whole(model)])))
    _check_shares(model, config)
    layers = select_targets(model, config)
    kinds = {layer.name: layer.kind for layer in layers}
    if problems := combination_problems(kinds, config.dropout, VARIANTS[config.variant]):
        raise ConfigError(problems[0])
    check_initialization(model, layers, config.init_lora_weights)
    targets = {layer.name: layer for layer in layers}
    auxiliary = AuxiliaryTargets.of(model, config, targets.keys())
    originals = checkpoint_weights(model, targets, config.init_lora_weights)

    def make(path: str, module: nn.Module) -> nn.Module | None:
        if path not in targets:
            return auxiliary.wrap(path, module)
        return wrap_layer(targets[path], config, config.adapter_dtype)

    wrap_stacks_(model, {layer.name: layer.module for layer in layers})
    added = [path for path in replace_modules_(model, make) if path in targets]
    auxiliary.train_biases_(lora_layers(model))
    adapted = lora_layers(model)
    with working("adding adapters", len(adapted), "layers") as work:
        for path, layer in adapted.items():
            initialize_(layer, path, config.init_lora_weights, originals)
            layer.adapter_name = name
            work.advance()
    freeze_base_(model)
    return added


def _check_shares(model: nn.Module, config: LoraConfig) -> None:
    """Raises ConfigError for what needs copies of a base that is in shares, or changes it."""
    wanted = {"modules_to_save": config.modules_to_save, "trainable_token_indices": config.trainable_token_indices}
    found = [f"{name} {list(value)}" for name, value in wanted.items() if value]
    if parse_init(config.init_lora_weights)[0] in ("pissa", "loftq"):
        found.append(f"init_lora_weights {config.init_lora_weights!r}")
    if found:
        check_whole(model, " and ".join(found))


def remove_lora_(model: nn.Module) -> list[str]:
    """Restores the base layers and drops all adapters and auxiliary parameters; returns the names of the layers that
    the adapter in use had adapted.

    `multi_adapter.delete_adapter_` drops one of several adapters.
    """
    drop_inactive_(model, *inactive_adapters(model))
    removed = unwrap_layers_(model)
    unwrap_stacks_(model)
    return removed


def unwrap_layers_(model: nn.Module) -> list[str]:
    """Restores the layers inside all wrappers (`WRAPPERS`); returns the names of those that had A and B."""
    layers = lora_layers(model)
    restored = replace_modules_(model, lambda name, layer: layer.base_layer if isinstance(layer, WRAPPERS) else None)
    return [name for name in restored if name in layers]


def wrapped_layers(model: nn.Module) -> dict[str, LoraLayer | TrainedCopy | TrainableTokensLayer]:
    """Returns every module by name that has an `adapter_enabled` switch."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WRAPPERS)}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what its base does, merged or not; then each layer's switch is restored."""
    before = {layer: layer.adapter_enabled for layer in wrapped_layers(model).values()}
    for layer in before:
        layer.adapter_enabled = False
    try:
        yield
    finally:
        for layer, enabled in before.items():
            layer.adapter_enabled = enabled


class InactiveAdapters(nn.Module):
    """Holds {adapter: {layer: its LoraLayer}} hidden from `parameters`, `state_dict` and `named_modules` of the model.

    As a submodule it follows the model through `to` and `deepcopy`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, Layers] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InactiveAdapters:
        """Applies `fn` to the adapters' parameters; `Module.to` and the like call this."""
        super()._apply(fn, recurse)
        for layers in self.adapters.values():
            for layer in layers.values():
                # A base that is attached for the moment is moved as a part of the model.
                layer._apply(fn, recurse=False)
        return self


def inactive_adapters(model: nn.Module) -> dict[str, Layers]:
    """Returns the adapters that are not in use by name, each as {layer: LoraLayer without a base}."""
    holder = getattr(model, ATTRIBUTE, None)
    return dict(holder.adapters) if isinstance(holder, InactiveAdapters) else {}


def keep_inactive_(model: nn.Module, name: str, layers: Layers) -> None:
    """Stores these layers as an adapter that is not in use."""
    if not isinstance(getattr(model, ATTRIBUTE, None), InactiveAdapters):
        model.add_module(ATTRIBUTE, InactiveAdapters())
    getattr(model, ATTRIBUTE).adapters[name] = layers


def drop_inactive_(model: nn.Module, *names: str) -> None:
    """Removes these adapters from those that are not in use."""
    holder = getattr(model, ATTRIBUTE, None)
    if not isinstance(holder, InactiveAdapters):
        return
    for name in names:
        del holder.adapters[name]
    if not holder.adapters:
        delattr(model, ATTRIBUTE)


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Raises ConfigError for a name with other characters than letters, digits, _ and -, TargetError if an inactive
    adapter has it."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(f"an adapter's name must consist of letters, digits, _ and -; got {name!r}")
    if name in inactive_adapters(model):
        raise TargetError(
            f"the model has an adapter named {name!r} already; add or load the new one under another name, "
            f"or remove the old one with delete_adapter_"
        )
