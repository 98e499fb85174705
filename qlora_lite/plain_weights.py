"""A model's weights under the names that a plain checkpoint gives them, whatever packing and adapters did to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from qlora_lite import hub
from qlora_lite.delta import Delta
from qlora_lite.errors import TargetError
from qlora_lite.lora import LoraLayer
from qlora_lite.quantize import PackedWeight


@dataclass(frozen=True)
class PlainWeight:
    """A tensor of the plain checkpoint. `holder`: what holds it in the model, equal for tied ones."""

    name: str
    holder: Any
    delta: Delta | None = None


def plain_weights(model: nn.Module) -> Iterator[PlainWeight]:
    """Every tensor that the model would have without adapters and packing, under the name that it would have."""

    def visit(module: nn.Module, prefix: str) -> Iterator[PlainWeight]:
        if isinstance(module, LoraLayer):
            yield PlainWeight(f"{prefix}weight", module.base_layer.weight, module.delta)
            yield from (weight for weight in visit(module.base_layer, prefix) if weight.name != f"{prefix}weight")
            return
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield PlainWeight(f"{prefix}{key}", parameter)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield PlainWeight(f"{prefix}{key}", buffer)
        for key, child in module._modules.items():
            if isinstance(child, PackedWeight):
                yield PlainWeight(f"{prefix}{key}", child)
            elif child is not None:
                yield from visit(child, f"{prefix}{key}.")

    return visit(model, "")


def weights_to_write(model: nn.Module) -> list[PlainWeight]:
    """Tied ones once. TargetError if one of a tied pair is adapted alone."""
    chosen: list[PlainWeight] = []
    first: dict[int, PlainWeight] = {}
    aliases = hub.tied_names(model)
    for weight in plain_weights(model):
        other = first.setdefault(id(weight.holder), weight)
        # Only what the config ties is found again by who loads the checkpoint; other shared tensors are written twice.
        if other is weight or not {weight.name, other.name} & aliases:
            chosen.append(weight)
        elif weight.delta is not None or other.delta is not None:
            raise TargetError(
                f"{weight.name} and {other.name} are one weight, and an adapter is on one of them: a merged checkpoint "
                f"would change both; save the adapter instead, or train without it"
            )
    return chosen
