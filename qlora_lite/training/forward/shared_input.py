"""Layers that read one input, multiplied at once: query, key and value of attention, gate and up of an MLP.

Their low-rank terms are one product with the stacked A's, forward and backward, and their gradients by the input are
summed in place. The outputs are prepared before the first layer is called, and handed to each layer when it is called
with that input. So every layer is still called, with its hooks, by code that does not know of this.

Whether a module calls layers with its own input is found out by running its forward with stand-ins for its modules.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch

from qlora_lite.compute.lora_linear import LinearMap, adapted_linears, hand_out, take_back
from qlora_lite.lora.kinds import LinearKind
from qlora_lite.lora.layer import LoraLayer

ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj")
# Arguments that attention reads keys and values from in place of its first one.
OTHER_INPUTS = ("key_value_states", "encoder_hidden_states")


def _map_of(layer: nn.Module) -> LinearMap | None:
    """Returns what a layer computes, None if that is more than a frozen linear map and a low-rank term."""
    if not isinstance(layer, LoraLayer) or type(layer.kind) is not LinearKind or "forward" in vars(layer):
        return None
    weight, lora = layer.current_weights()
    if lora is None or layer.variant.gain is not None or (layer.training and layer.dropout > 0):
        return None
    return LinearMap(weight, layer.bias, *lora, layer.scaling)


def prepare_outputs(x: object, layers: Sequence[nn.Module]) -> None:
    """Computes the outputs of these layers for x at once, if gradients are wanted; each takes its own when called."""
    if not isinstance(x, Tensor) or not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return
    maps = {id(layer): found for layer in layers if (found := _map_of(layer)) is not None}
    dtypes = {getattr(layer.base_layer, "compute_dtype", None) for layer in layers if id(layer) in maps}
    if len(maps) < 2 or len(dtypes) > 1 or not x.is_floating_point():
        return
    if {found.weight.shape[1] for found in maps.values()} != {x.shape[-1]}:
        return
    (dtype,) = dtypes
    hand_out(x, dict(zip(maps, adapted_linears(x, list(maps.values()), compute_dtype=dtype), strict=True)))


class _Anything:
    """Stands for whatever a forward makes of the output of a module."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):  # of a protocol, such as that of tensors
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **options: object) -> _Anything:
        return self


class _AllRead(Exception):
    """Every layer has got its input."""


class _StandIn:
    """Stands for a module: its layers `names` note what they are called with, and its other modules do nothing."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._module, self._names = module, names
        self.read: dict[str, object] = {}

    def __getattr__(self, name: str) -> Any:
        if name in self._names:
            return functools.partial(self._note, name)
        value = getattr(self._module, name)
        return _Anything() if isinstance(value, nn.Module) else value

    def _note(self, name: str, x: object) -> _Anything:
        self.read[name] = x
        if len(self.read) == len(self._names):
            raise _AllRead
        return _Anything()


def shares_input(module: nn.Module, names: Sequence[str] = ATTENTION_PARTS) -> bool:
    """Whether the forward of a module calls its layers of these names with its first argument, before all else."""
    layers = [getattr(module, name, None) for name in names]
    if not all(isinstance(layer, nn.Module) and hasattr(layer, "in_features") for layer in layers):
        return False
    forward = type(module).forward
    _, _, *others = inspect.signature(forward).parameters.values()
    named = (p for p in others if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    required = {p.name: None for p in named if p.default is p.empty}
    stand_in: Any = _StandIn(module, names)
    with no_dispatch(), torch.no_grad():
        x = torch.zeros(1, 1, layers[0].in_features)  # type: ignore[union-attr]
        try:
            forward(stand_in, x, **required)
        except _AllRead:
            return all(value is x for value in stand_in.read.values())
        except Exception:  # the code of a model may fail on a stand-in in any way
            return False
    return False


def first_argument(module: nn.Module) -> str:
    """Returns the name of the first argument of a module's forward."""
    return list(inspect.signature(type(module).forward).parameters)[1]


def with_shared_input(module: nn.Module, own: Callable[..., Any], first: str, *args: Any, **options: Any) -> Any:
    """Runs a module's own forward, with the outputs of the layers that share its input prepared.

    first: the name of its first argument.
    """
    x = args[0] if args else options.get(first)
    if all(options.get(name) is None for name in OTHER_INPUTS):
        prepare_outputs(x, [getattr(module, name) for name in ATTENTION_PARTS])
    try:
        return own(*args, **options)
    finally:
        take_back(x)
