"""Where a model keeps the adapters that are not in use: beside its modules, by name, as LoraLayers without a base.

They follow the model to a device or dtype and into a deep copy. They are no parameters, buffers or submodules of it:
nothing trains, counts or saves them with the model, and a model without any has no trace of this.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from qlora_lite.errors import ConfigError, TargetError

ATTRIBUTE = "parked_adapters"
Layers = dict[str, Any]


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
