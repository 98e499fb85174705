"""A model's weights under the names that a plain checkpoint gives them, whatever packing and adapters did to it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.compute.weight_update import Delta, Replaced, Rows, Update
from qlora_lite.errors import ConfigError, listing
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.auxiliary_layers import TrainableTokensLayer, TrainedCopy
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.quantization.experts import DenseStack, PackedStack
from qlora_lite.quantization.packed_weight import PackedWeight


@dataclass(frozen=True)
class PlainWeight:
    """A tensor of the plain checkpoint.

    holder: what holds it in the model, equal for tied ones. tied_to: other names of the holder by the config, under
    one of which the checkpoint that the model came from may have it. transposed: the holder was turned round to be
    packed; the delta is in the checkpoint's orientation.
    """

    name: str
    holder: Any
    delta: Update | None = None
    transposed: bool = False
    tied_to: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """In the plain checkpoint."""
        held = tuple(self.holder.shape)
        return (*held[:-2], held[-1], held[-2]) if self.transposed else held

    def name_in(self, checkpoint: Container[str]) -> str | None:
        """The name under which that checkpoint has it, None if it does not."""
        return next((name for name in (self.name, *self.tied_to) if name in checkpoint), None)


def _trained(module: nn.Module) -> Mapping[str, Update]:
    """The updates of a module's own parameters by name: those trained whole, rows of them, and biases."""

    def rows_of(values: Tensor) -> Rows:
        return lambda start, stop: values.detach()[start:stop] if values.dim() else values.detach()

    if isinstance(module, TrainedCopy):
        return {name: Replaced(rows_of(values), values) for name, values in module.trained.items()}
    if isinstance(module, TrainableTokensLayer):
        return {"weight": Replaced(rows_of(module.rows.values), module.rows, module.rows.indices)}
    assert isinstance(module, LoraLayer)
    bias = module.trained_bias
    if bias is not None:
        return {"bias": Replaced(rows_of(bias), bias)}
    added = module.variant.bias_update(module.scaling, module.lora_parameters)
    return {} if added is None else {"bias": added}


def _own(module: nn.Module, prefix: str) -> Iterator[PlainWeight]:
    """The tensors that a module holds itself."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield PlainWeight(f"{prefix}{key}", parameter)
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            yield PlainWeight(f"{prefix}{key}", buffer)


def plain_weights(model: nn.Module) -> Iterator[PlainWeight]:
    """Every tensor that the model would have without adapters and packing, under the name that it would have."""

    def visit_base(layer: LoraLayer, prefix: str) -> Iterator[PlainWeight]:
        delta = layer.delta
        if not isinstance(delta, Delta):  # of a stack, which the checkpoint has as a parameter of the module above
            yield PlainWeight(prefix.removesuffix("."), layer.base_layer.weight, delta)
            return
        turned = getattr(layer.base_layer, "transposed", False)
        delta = delta.transposed if turned else delta
        yield PlainWeight(f"{prefix}weight", layer.base_layer.weight, delta, turned)
        yield from (weight for weight in visit(layer.base_layer, prefix) if weight.name != f"{prefix}weight")

    def visit(module: nn.Module, prefix: str) -> Iterator[PlainWeight]:
        if isinstance(module, (LoraLayer, TrainedCopy, TrainableTokensLayer)):
            trained = {f"{prefix}{name}": update for name, update in _trained(module).items()}
            own = visit_base(module, prefix) if isinstance(module, LoraLayer) else visit(module.base_layer, prefix)
            yield from (replace(weight, delta=trained.get(weight.name, weight.delta)) for weight in own)
            return
        yield from _own(module, prefix)
        for key, child in module._modules.items():
            if isinstance(child, (PackedStack, DenseStack)):
                yield PlainWeight(f"{prefix}{key}", child if isinstance(child, PackedStack) else child.weight)
            elif isinstance(child, PackedWeight):
                yield PlainWeight(f"{prefix}{key}", child, transposed=getattr(module, "transposed", False))
            elif child is not None:
                yield from visit(child, f"{prefix}{key}.")

    return visit(model, "")


def _differ(updates: list[Update | None]) -> bool:
    """Whether tied weights are not the same any more: any has an update, unless they share it."""
    owners = {id(update.owner) if isinstance(update, Replaced) else id(update) for update in updates}
    shared = len(owners) == 1 and all(update is None or isinstance(update, Replaced) for update in updates)
    return not shared


def _check_biases(model: nn.Module) -> None:
    """Raises ConfigError, listing all layers whose variant adds to a bias that the plain checkpoint does not have."""
    lost = [
        name
        for name, layer in lora_layers(model).items()
        if layer.variant.added_bias is not None and getattr(layer.base_layer, "bias", None) is None
    ]
    if lost:
        raise ConfigError(f"the adapter adds a bias to layers that have none in a plain checkpoint: {listing(lost, 4)}")


def weights_to_write(model: nn.Module) -> tuple[list[PlainWeight], bool]:
    """What the checkpoint holds, and whether it is untied: tied weights are written once, or all if one is adapted.

    All of the model's, since a config unties every pair or none.
    """
    _check_biases(model)
    weights = list(plain_weights(model))
    sharing: dict[int, list[PlainWeight]] = {}
    for weight in weights:
        sharing.setdefault(id(weight.holder), []).append(weight)
    # Only what the config ties is found again by who loads the checkpoint; other shared tensors are written twice.
    aliases = architecture.tied_names(model)
    tied = [group for group in sharing.values() if len(group) > 1 and aliases & {weight.name for weight in group}]
    if any(_differ([weight.delta for weight in group]) for group in tied):
        names = {weight.name: tuple(twin.name for twin in group) for group in tied for weight in group}
        return [replace(weight, tied_to=names.get(weight.name, ())) for weight in weights], True
    spared = {weight.name for group in tied for weight in group[1:] if {weight.name, group[0].name} & aliases}
    return [weight for weight in weights if weight.name not in spared], False
