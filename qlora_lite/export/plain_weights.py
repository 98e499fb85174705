"""The weights of a model under the names of a plain checkpoint, with packing and adapters undone by name.

The step of a weight on its way out that lists what plan.py and quantized.py write.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.compute.weight_update import Delta, Replacement, Rows, Update
from qlora_lite.errors import ConfigError, listing
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.auxiliary_layers import TrainableTokensLayer, TrainedCopy
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.quantization.experts import DenseStack, PackedStack
from qlora_lite.quantization.packed_weight import PackedWeight

# The object of a model that holds a weight.
Holder = Tensor | PackedWeight | PackedStack


@dataclass(frozen=True)
class PlainWeight:
    """A tensor of the plain checkpoint.

    holder: the object of the model that holds it, the same one for tied tensors. delta: the adapter's update of it, in
    the orientation of the checkpoint. transposed: the holder was transposed to be packed. tied_to: other names of the
    holder by the config; the checkpoint that the model came from may have it under one of these alone.
    """

    name: str
    holder: Holder
    delta: Update | None = None
    transposed: bool = False
    tied_to: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the plain checkpoint."""
        held = tuple(self.holder.shape)
        return (*held[:-2], held[-1], held[-2]) if self.transposed else held

    def name_in(self, checkpoint: Container[str]) -> str | None:
        """Returns the name under which a checkpoint has the tensor, None if it does not."""
        return next((name for name in (self.name, *self.tied_to) if name in checkpoint), None)


def _trained(module: nn.Module) -> Mapping[str, Update]:
    """Returns the updates of a module's own parameters by name: trained as a whole, in some rows, or as a bias."""

    def rows_of(values: Tensor) -> Rows:
        return lambda start, stop: values.detach()[start:stop] if values.dim() else values.detach()

    if isinstance(module, TrainedCopy):
        return {name: Replacement(rows_of(values), values) for name, values in module.trained.items()}
    if isinstance(module, TrainableTokensLayer):
        return {"weight": Replacement(rows_of(module.rows.values), module.rows, module.rows.indices)}
    assert isinstance(module, LoraLayer)
    bias = module.trained_bias
    if bias is not None:
        return {"bias": Replacement(rows_of(bias), bias)}
    added = module.variant.bias_update(module.scaling, module.lora_parameters)
    return {} if added is None else {"bias": added}


def _holder(layer: LoraLayer) -> Holder:
    weight = layer.base_layer.weight
    assert isinstance(weight, (Tensor, PackedWeight, PackedStack))
    return weight


def _direct_tensors(module: nn.Module, prefix: str) -> Iterator[PlainWeight]:
    """Yields the parameters and persistent buffers that a module holds directly."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield PlainWeight(f"{prefix}{key}", parameter)
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            yield PlainWeight(f"{prefix}{key}", buffer)


def plain_weights(model: nn.Module) -> Iterator[PlainWeight]:
    """Yields every tensor that the model would have without adapters and packing, under its name there."""

    def visit_base(layer: LoraLayer, prefix: str) -> Iterator[PlainWeight]:
        delta = layer.delta
        if not isinstance(delta, Delta):  # a stack of experts: a parameter of the parent module in the checkpoint
            yield PlainWeight(prefix.removesuffix("."), _holder(layer), delta)
            return
        transposed = getattr(layer.base_layer, "transposed", False)
        delta = delta.transposed if transposed else delta
        yield PlainWeight(f"{prefix}weight", _holder(layer), delta, transposed)
        yield from (weight for weight in visit(layer.base_layer, prefix) if weight.name != f"{prefix}weight")

    def visit(module: nn.Module, prefix: str) -> Iterator[PlainWeight]:
        if isinstance(module, (LoraLayer, TrainedCopy, TrainableTokensLayer)):
            trained = {f"{prefix}{name}": update for name, update in _trained(module).items()}
            own = visit_base(module, prefix) if isinstance(module, LoraLayer) else visit(module.base_layer, prefix)
            yield from (replace(weight, delta=trained.get(weight.name, weight.delta)) for weight in own)
            return
        yield from _direct_tensors(module, prefix)
        for key, child in module._modules.items():
            if isinstance(child, (PackedStack, DenseStack)):
                yield PlainWeight(f"{prefix}{key}", child if isinstance(child, PackedStack) else child.weight)
            elif isinstance(child, PackedWeight):
                yield PlainWeight(f"{prefix}{key}", child, transposed=getattr(module, "transposed", False))
            elif child is not None:
                yield from visit(child, f"{prefix}{key}.")

    return visit(model, "")


def _differ(updates: list[Update | None]) -> bool:
    """Whether tied weights have become different: one of them has an update, and they do not share it."""
    owners = {id(update.owner) if isinstance(update, Replacement) else id(update) for update in updates}
    shared = len(owners) == 1 and all(update is None or isinstance(update, Replacement) for update in updates)
    return not shared


def _check_biases(model: nn.Module) -> None:
    """Raises ConfigError, listing all layers whose variant adds to a bias that the plain checkpoint does not have."""
    without_bias = [
        name
        for name, layer in lora_layers(model).items()
        if layer.variant.added_bias is not None and getattr(layer.base_layer, "bias", None) is None
    ]
    if without_bias:
        names = listing(without_bias, 4)
        raise ConfigError(f"the adapter adds a bias to layers that have none in a plain checkpoint: {names}")


def weights_to_write(model: nn.Module) -> tuple[list[PlainWeight], bool]:
    """Returns the tensors to write, and whether tied weights are written apart.

    Tied weights are written once. If one of them is adapted, all tied weights of the model are written, because a
    config unties all pairs or none.
    """
    _check_biases(model)
    weights = list(plain_weights(model))
    sharing: dict[int, list[PlainWeight]] = {}
    for weight in weights:
        sharing.setdefault(id(weight.holder), []).append(weight)
    # Loading restores only the ties that the config declares. Other shared tensors are written twice.
    aliases = architecture.tied_names(model)
    tied = [group for group in sharing.values() if len(group) > 1 and aliases & {weight.name for weight in group}]
    names = {weight.name: tuple(other.name for other in group) for group in tied for weight in group}
    weights = [replace(weight, tied_to=names.get(weight.name, ())) for weight in weights]
    if any(_differ([weight.delta for weight in group]) for group in tied):
        return weights, True
    # Some models declare the alias first: a head before the embedding that it is tied to.
    shared = {id(weight.holder) for group in tied for weight in group if weight.name not in aliases}
    return [weight for weight in weights if weight.name not in aliases or id(weight.holder) not in shared], False
