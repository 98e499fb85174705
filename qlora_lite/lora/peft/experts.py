"""Adapters on stacks of experts in peft's files: their keys and their layout.

With `target_parameters` peft wraps an experts module once for each of its stacks, the first declared stack innermost.
So a key says how deep the stack's wrapper is (`….experts.base_layer.lora_A.weight`) and not which stack it is; that
follows from the stacks that the configuration targets. The matrices lie flat:

    A  in the model (experts, rank, in)    in the file (experts * rank, in)     one expert after the other
    B  in the model (experts, out, rank)   in the file (out, rank * experts)    column rank * experts + expert
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from qlora_lite.lora.targets import TargetedLayer
from qlora_lite.quantization.experts import DenseStack, PackedStack, RoutedExperts

WRAPPED = ".base_layer"


def _declared_stacks(module: nn.Module) -> list[str]:
    """Returns the parameters of an experts module in the order in which transformers declares them."""
    return list(module.stack_names) if isinstance(module, RoutedExperts) else list(module._parameters)


def stack_key_names(model: nn.Module, stacks: Iterable[str]) -> dict[str, str]:
    """Returns {stack: the module name in its keys} for a file in which exactly these stacks are adapted."""
    by_module: dict[str, list[str]] = {}
    for name in stacks:
        by_module.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    key_names = {}
    for owner, names in by_module.items():
        inner_first = [name for name in _declared_stacks(model.get_submodule(owner)) if name in names]
        for depth, name in enumerate(reversed(inner_first)):
            key_names[f"{owner}.{name}"] = owner + WRAPPED * depth
    return key_names


def flatten_A(lora_A: Tensor) -> Tensor:
    """Returns A `(experts, rank, in)` in the layout of the file."""
    return lora_A.flatten(0, 1)


def flatten_B(lora_B: Tensor) -> Tensor:
    """Returns B `(experts, out, rank)` in the layout of the file."""
    return lora_B.permute(1, 2, 0).flatten(1)


def unflatten_A(flat: Tensor, experts: int) -> Tensor:
    """Returns the file's A as `(experts, rank, in)`, or unchanged if its shape does not fit this number of experts."""
    if flat.dim() != 2 or flat.shape[0] % experts:
        return flat
    return flat.reshape(experts, -1, flat.shape[1])


def unflatten_B(flat: Tensor, experts: int) -> Tensor:
    """Returns the file's B as `(experts, out, rank)`, or unchanged if its shape does not fit this number of experts."""
    if flat.dim() != 2 or flat.shape[1] % experts:
        return flat
    return flat.reshape(flat.shape[0], -1, experts).permute(2, 0, 1).contiguous()


def unflatten_stacks(
    in_file: Mapping[str, Mapping[str, Tensor]], key_names: Mapping[str, str], layers: Mapping[str, TargetedLayer]
) -> dict[str, dict[str, Tensor]]:
    """Returns A and B under the names of the layers, those of stacks unflattened.

    in_file: {module name in the keys: tensors}. key_names: those of the stacks (`stack_key_names`).
    """
    stacks = {key_name: name for name, key_name in key_names.items()}
    found = {}
    for key_name, tensors in in_file.items():
        name, converted = stacks.get(key_name, key_name), dict(tensors)
        if key_name in stacks:
            stack = layers[name].module
            assert isinstance(stack, (PackedStack, DenseStack))
            converted["lora_A"] = unflatten_A(tensors["lora_A"], stack.experts)
            converted["lora_B"] = unflatten_B(tensors["lora_B"], stack.experts)
        found[name] = converted
    return found
