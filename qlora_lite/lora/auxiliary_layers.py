"""Parameters that are trained themselves, beside the frozen originals: peft's modules_to_save, and biases.

    y = f(x; P')      f: what the module computes, P': trained copies of some or all of its parameters

The originals are never written to, so that the base is there again, bit for bit, when the copies are switched off. A
packed weight's copy is unpacked. Copies are kept in a dtype of their own (fp32: small updates add up) and cast to that
of the originals for the product, as A and B are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from qlora_lite.compute.lora_linear import check_features, product_dtype
from qlora_lite.errors import TargetError, listing
from qlora_lite.lora.kinds import LinearKind, kind_of
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.surgery import has_own_forward

SCALE = "embed_scale"  # what transformers' scaled embeddings (Gemma) multiply their rows with


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


class TokenRows(nn.Module):
    """The trained rows, `values` `(tokens, features)`, one for each of `indices`. A tie is two owners of one."""

    tokens: Tensor

    def __init__(self, indices: Sequence[int], values: Tensor) -> None:
        super().__init__()
        self.indices = tuple(indices)
        self.register_buffer("tokens", torch.tensor(self.indices, device=values.device))
        self.values = nn.Parameter(values)

    def looked_up(self, x: Tensor, dtype: torch.dtype, padding_idx: int | None) -> tuple[Tensor, Tensor]:
        """(whether a token has a row here, that row or any) of tokens x. No gradient goes to the padding token's."""
        ordered, places = self.tokens.sort()
        nearest = torch.searchsorted(ordered, x.to(ordered.dtype)).clamp_(max=len(self.indices) - 1)
        padding = self.indices.index(padding_idx) if padding_idx in self.indices else None
        return ordered[nearest] == x, F.embedding(places[nearest], self.values.to(dtype), padding)

    def extra_repr(self) -> str:
        return f"tokens={self.indices}"


class WithTokenRows(nn.Module):
    """An embedding, or an output head tied to one, with trained rows for some tokens.

    `adapter_enabled=False` computes what the base does. What is asked of it beyond that, the base answers: `weight` is
    that of the base.
    """

    def __init__(self, base_layer: nn.Module, rows: TokenRows) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.rows = rows
        self.adapter_enabled = True
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if "rows" not in modules or name in modules:
            return super().__getattr__(name)
        return getattr(modules["base_layer"], name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if not self.adapter_enabled:
            return y
        if isinstance(kind_of(self.base_layer), LinearKind):
            bias, values = getattr(self.base_layer, "bias", None), self.rows.values.to(x.dtype)
            logits = F.linear(x, values, None if bias is None else bias[self.rows.tokens].to(x.dtype))
            return y.index_copy(-1, self.rows.tokens, logits.to(y.dtype))
        inside, rows = self.rows.looked_up(x, y.dtype, getattr(self.base_layer, "padding_idx", None))
        scale = getattr(self.base_layer, SCALE, None)
        if scale is not None:
            rows = rows * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(inside.unsqueeze(-1), rows, y)


@torch.no_grad()
def rows_of(base: Any, indices: Sequence[int], dtype: torch.dtype) -> Tensor:
    """These rows of an embedding's or a head's weight, packed or not, unpacked and in this dtype."""
    tokens = torch.tensor(indices, device=base.weight.device)
    if isinstance(base.weight, Tensor):
        return base.weight.detach().index_select(0, tokens).to(dtype)
    return base.weight.rows(tokens, dtype)  # type: ignore[no-any-return]


def check_tokens(indices: Sequence[int], vocabulary: int) -> None:
    """TargetError for tokens that a weight of so many rows does not have."""
    if outside := [index for index in indices if index >= vocabulary]:
        raise TargetError(
            f"trainable_token_indices {listing(outside)} are outside the vocabulary, which has {vocabulary} tokens: "
            f"resize the model's embeddings first"
        )


@torch.no_grad()
def check_takes_rows(name: str, base: nn.Module) -> None:
    """TargetError for a layer that does more with a row of its weight than return, multiply or scale it."""
    kind = kind_of(base)
    plain = kind is not None and getattr(base, "max_norm", None) is None
    if isinstance(base, nn.Embedding) and has_own_forward(base):
        plain = hasattr(base, SCALE)
        if plain and type(base.weight.data) is Tensor and not base.weight.is_meta:  # fake ones have no values
            token = torch.tensor([base.num_embeddings - 1], device=base.weight.device)
            scale: Any = getattr(base, SCALE)
            plain = torch.allclose(base(token), base.weight[token] * torch.as_tensor(scale).to(base.weight.dtype))
    if not plain:
        raise TargetError(f"{name}, a {type(base).__name__}, computes more than rows of its weight: train it whole")
