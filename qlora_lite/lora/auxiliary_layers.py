"""Modules with trained copies of their parameters, for peft's modules_to_save, bias and trainable_token_indices.

    y = f(x; P')      f: what the module computes, P': trained copies of some or all of its parameters

The originals are never written to, so that switching the copies off restores the base bit for bit. The copy of a packed
weight is unpacked. Copies have a dtype of their own (fp32, in which small updates add up) and are cast to that of the
originals for the product, as A and B are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from qlora_lite.compute.lora_linear import check_features
from qlora_lite.compute.products.frozen_weight import product_dtype
from qlora_lite.errors import TargetError, listing
from qlora_lite.lora.kinds import LinearKind, kind_of
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.surgery import has_own_forward

# The buffer or number that transformers' scaled embeddings (Gemma) multiply their rows with.
EMBED_SCALE = "embed_scale"


def checkpoint_shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """Returns the shape that a plain checkpoint has for a parameter of this module, packed or not; None without it."""
    weight = module._modules.get(name) if isinstance(module, (QuantizedLinear, QuantizedEmbedding)) else None
    if isinstance(weight, PackedWeight):
        rows, columns = weight.shape
        return (columns, rows) if getattr(module, "transposed", False) else (rows, columns)
    parameter = module._parameters.get(name)
    return None if parameter is None else tuple(parameter.shape)


def parameter_names(module: nn.Module) -> list[str]:
    """Returns the names of the parameters that the module itself holds, a packed weight included."""
    return [name for name in (*module._modules, *module._parameters) if checkpoint_shape(module, name) is not None]


@torch.no_grad()
def copy_parameters(module: nn.Module, names: Collection[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the values of these parameters as new tensors, unpacked and in the plain checkpoint's orientation."""
    values = {}
    for name in names:
        weight = getattr(module, name)
        if isinstance(weight, Tensor):
            values[name] = weight.detach().to(dtype, copy=True)
        else:
            unpacked = weight.dequantize(dtype)
            values[name] = unpacked.T.contiguous() if getattr(module, "transposed", False) else unpacked
    return values


class TrainedCopy(nn.Module):
    """y = f(x; P'): a module with trained copies P' of some or all of its parameters.

    trained: the copies by the parameters' names, in the plain checkpoint's orientation. With `adapter_enabled=False`
    the module computes with the originals. Other attributes are those of the module inside; the name of a copied
    parameter gives the values that are computed with.
    """

    def __init__(self, base_layer: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.trained = nn.ParameterDict({name: nn.Parameter(value) for name, value in values.items()})
        self.adapter_enabled = True
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        modules = self.__dict__.get("_modules", {})
        if "trained" not in modules or name in modules:
            return super().__getattr__(name)
        if self.adapter_enabled and name in modules["trained"]:
            copy: Tensor = modules["trained"][name]
            return copy
        attribute: Tensor | nn.Module = getattr(modules["base_layer"], name)
        return attribute

    def forward(self, *args: object, **named: object) -> object:
        if not self.adapter_enabled:
            return self.base_layer(*args, **named)
        base = self.base_layer
        if isinstance(base, (QuantizedLinear, QuantizedEmbedding)) and "weight" in self.trained:
            return self._unpacked(base, *args, **named)  # type: ignore[arg-type]
        originals = dict(base.named_parameters(recurse=False))
        swapped = {name: value.to(originals[name].dtype) for name, value in self.trained.items()}
        return functional_call(base, swapped, args, named)

    def _unpacked(self, base: QuantizedLinear | QuantizedEmbedding, x: Tensor) -> Tensor:
        """Computes the packed layer's output with the unpacked copy of its weight."""
        weight = self.trained["weight"]
        if isinstance(base, QuantizedEmbedding):
            return F.embedding(x, weight, base.padding_idx).to(base.output_dtype)
        check_features(x, base.in_features)
        dtype, bias = product_dtype(x, base.compute_dtype), self.trained.get("bias", base.bias)
        weight = weight.T if base.transposed else weight
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"trained={list(self.trained)}"


class TokenRows(nn.Module):
    """Trained rows of an embedding: `values` `(tokens, features)`, one row for each of `indices`.

    An embedding and a head that is tied to it hold the same TokenRows.
    """

    tokens: Tensor

    def __init__(self, indices: Sequence[int], values: Tensor) -> None:
        super().__init__()
        self.indices = tuple(indices)
        self.register_buffer("tokens", torch.tensor(self.indices, device=values.device))
        self.values = nn.Parameter(values)

    def lookup(self, x: Tensor, dtype: torch.dtype, padding_idx: int | None) -> tuple[Tensor, Tensor]:
        """Returns (whether each token of x has a trained row, that row or an arbitrary one).

        The row of the padding token gets no gradient.
        """
        ordered, order = self.tokens.sort()
        nearest = torch.searchsorted(ordered, x.to(ordered.dtype)).clamp_(max=len(self.indices) - 1)
        padding = self.indices.index(padding_idx) if padding_idx in self.indices else None
        return ordered[nearest] == x, F.embedding(order[nearest], self.values.to(dtype), padding)

    def extra_repr(self) -> str:
        return f"tokens={self.indices}"


class TrainableTokensLayer(nn.Module):
    """An embedding, or an output head tied to one, with trained rows for some tokens.

    With `adapter_enabled=False` it computes what the base does. Other attributes are those of the base; `weight` is the
    base's, without the trained rows.
    """

    def __init__(self, base_layer: nn.Module, rows: TokenRows) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.rows = rows
        self.adapter_enabled = True
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        modules = self.__dict__.get("_modules", {})
        if "rows" not in modules or name in modules:
            return super().__getattr__(name)
        attribute: Tensor | nn.Module = getattr(modules["base_layer"], name)
        return attribute

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if not self.adapter_enabled:
            return y
        if isinstance(kind_of(self.base_layer), LinearKind):
            bias, values = getattr(self.base_layer, "bias", None), self.rows.values.to(x.dtype)
            logits = F.linear(x, values, None if bias is None else bias[self.rows.tokens].to(x.dtype))
            return y.index_copy(-1, self.rows.tokens, logits.to(y.dtype))
        inside, rows = self.rows.lookup(x, y.dtype, getattr(self.base_layer, "padding_idx", None))
        scale = getattr(self.base_layer, EMBED_SCALE, None)
        if scale is not None:
            rows = rows * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(inside.unsqueeze(-1), rows, y)


@torch.no_grad()
def unpacked_rows(base: nn.Module, indices: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns these rows of the weight of an embedding or a head, packed or not, as a new tensor."""
    weight = base.weight
    assert isinstance(weight, (Tensor, PackedWeight))
    tokens = torch.tensor(indices, device=weight.device)
    if isinstance(weight, Tensor):
        return weight.detach().index_select(0, tokens).to(dtype)
    return weight.rows(tokens, dtype)


def check_tokens(indices: Sequence[int], vocabulary: int) -> None:
    """Raises TargetError for tokens that a weight with this number of rows does not have."""
    if outside := [index for index in indices if index >= vocabulary]:
        raise TargetError(
            f"trainable_token_indices {listing(outside)} are outside the vocabulary, which has {vocabulary} tokens: "
            f"resize the model's embeddings first"
        )


@torch.no_grad()
def check_takes_token_rows(name: str, base: nn.Module) -> None:
    """Raises TargetError for a layer that does more with a row of its weight than return, multiply or scale it."""
    supported = kind_of(base) is not None and getattr(base, "max_norm", None) is None
    if isinstance(base, nn.Embedding) and has_own_forward(base):
        supported = hasattr(base, EMBED_SCALE)
        if supported and type(base.weight.data) is Tensor and not base.weight.is_meta:  # fake tensors have no values
            token = torch.tensor([base.num_embeddings - 1], device=base.weight.device)
            scale = torch.as_tensor(getattr(base, EMBED_SCALE)).to(base.weight.dtype)
            supported = torch.allclose(base(token), base.weight[token] * scale)
    if not supported:
        raise TargetError(
            f"{name}, a {type(base).__name__}, computes more than rows of its weight, so trainable_token_indices "
            f"cannot train rows of it; name it in modules_to_save"
        )
