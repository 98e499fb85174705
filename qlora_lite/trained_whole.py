"""Parameters that are trained themselves, beside the frozen originals: peft's modules_to_save, and biases.

    y = f(x; P')      f: what the module computes, P': trained copies of some or all of its parameters

The originals are never written to, so that the base is there again, bit for bit, when the copies are switched off. A
packed weight's copy is unpacked. Copies are kept in a dtype of their own (fp32: small updates add up) and cast to that
of the originals for the product, as A and B are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from qlora_lite.compute.lora_linear import check_features, product_dtype
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight


def plain_shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """The shape in a plain checkpoint of a parameter of this module, packed or not; None if it has no such one."""
    weight = module._modules.get(name) if isinstance(module, (QuantizedLinear, QuantizedEmbedding)) else None
    if isinstance(weight, PackedWeight):
        rows, columns = weight.shape
        return (columns, rows) if getattr(module, "transposed", False) else (rows, columns)
    parameter = module._parameters.get(name)
    return None if parameter is None else tuple(parameter.shape)


def parameter_names(module: nn.Module) -> list[str]:
    """Names of the parameters that this module holds itself, a packed one among them."""
    return [name for name in (*module._modules, *module._parameters) if plain_shape(module, name) is not None]


@torch.no_grad()
def copied(module: nn.Module, names: Collection[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The values of these parameters in the plain checkpoint's orientation, new tensors."""
    values = {}
    for name in names:
        weight: Any = getattr(module, name)
        if isinstance(weight, Tensor):
            values[name] = weight.detach().to(dtype, copy=True)
        else:
            unpacked = weight.dequantize(dtype)
            values[name] = unpacked.T.contiguous() if getattr(module, "transposed", False) else unpacked
    return values


class TrainedCopy(nn.Module):
    """A module with trained copies of parameters: `trained`, by their names, in the plain checkpoint's orientation.

    `adapter_enabled=False` computes with the originals. What is asked of it beyond that, the module inside answers; for
    the name of a copied parameter, the one that is computed with.
    """

    def __init__(self, base_layer: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.trained = nn.ParameterDict({name: nn.Parameter(value) for name, value in values.items()})
        self.adapter_enabled = True
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if "trained" not in modules or name in modules:
            return super().__getattr__(name)
        if self.adapter_enabled and name in modules["trained"]:
            return modules["trained"][name]
        return getattr(modules["base_layer"], name)

    def forward(self, *args: Any, **named: Any) -> Any:
        if not self.adapter_enabled:
            return self.base_layer(*args, **named)
        if isinstance(self.base_layer._modules.get("weight"), PackedWeight) and "weight" in self.trained:
            return self._unpacked(*args, **named)
        own = self.base_layer._parameters
        swapped = {name: value.to(own[name].dtype) for name, value in self.trained.items()}  # type: ignore[union-attr]
        return functional_call(self.base_layer, swapped, args, named)

    def _unpacked(self, x: Tensor) -> Tensor:
        """What the packed layer computes, of the unpacked copy."""
        base, weight = self.base_layer, self.trained["weight"]
        if isinstance(base, QuantizedEmbedding):
            return F.embedding(x, weight, base.padding_idx).to(base.output_dtype)
        assert isinstance(base, QuantizedLinear)
        check_features(x, base.in_features)
        dtype, bias = product_dtype(x, base.compute_dtype), self.trained.get("bias", base.bias)
        weight = weight.T if base.transposed else weight
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"trained={list(self.trained)}"
