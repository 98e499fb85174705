"""Layers with the same input multiplied at once: query, key and value, or gate and up.

For one row, a product of copied codes (repacked_codes.py) takes about as long as the Python around it. The codes of
layers that get the same tensor are laid behind each other, so that the first layer computes the product for all, and
the others take their part of it. Which layers share an input is seen in the first step. The layers' own copies become
views of the joined one, so that joining takes no memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite.compute.lora_linear import FEW_ROWS, add_few_rows_update_
from qlora_lite.lora.kinds import LinearKind
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.patches import patched_forward
from qlora_lite.quantization.kernels import DecodeCopy, copy_product
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight

Forward = Callable[[Tensor], Tensor]


def _base_of(layer: nn.Module) -> QuantizedLinear | None:
    """The packed linear layer that a layer is or adapts, None if there is none with a copy of its codes."""
    base = layer.base_layer if isinstance(layer, LoraLayer) and type(layer.kind) is LinearKind else layer
    return base if type(base) is QuantizedLinear and base.weight.decode_copy is not None else None


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer now computes the product with its packed weight, a low-rank update and a bias, and no more."""
    base = layer.base_layer if isinstance(layer, LoraLayer) else layer
    if getattr(base, "compute_dtype", None) not in (None, torch.bfloat16):
        return False
    if not isinstance(layer, LoraLayer) or not layer.adapter_enabled:
        return True
    drops = layer.training and layer.dropout > 0
    return layer.merged_weight is None and layer.variant.gain is None and not drops


def _suits(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.dtype == torch.bfloat16
        and x.numel() <= FEW_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and not x.is_inference()  # without a version, a change of the input would go unnoticed
        and not torch.is_autocast_enabled("cpu")
    )


class JoinedProduct:
    """The product of several weights with one input; hands each layer its part once."""

    def __init__(self, weights: Sequence[PackedWeight]) -> None:
        self._weights, self._sizes = weights, [weight.shape[0] for weight in weights]
        self._input: Tensor | None = None
        self._version = 0
        self._parts: list[Tensor | None] = [None] * len(weights)
        self._is_shared = True
        self._views: list[DecodeCopy] = []
        self._join()

    def _join(self) -> bool:
        """Joins the copies of the weights; returns False if one has none any more."""
        copies = [weight.decode_copy for weight in self._weights if weight.decode_copy is not None]
        if len(copies) < len(self._weights):
            return False
        codes, absmax = (torch.cat(parts, dim) for dim, parts in enumerate(zip(*copies, strict=True)))
        self._copy = DecodeCopy(codes, absmax)
        views = zip(codes.split(self._sizes), absmax.split(self._sizes, dim=1), strict=True)
        self._views = [DecodeCopy(*view) for view in views]
        for weight, view in zip(self._weights, self._views, strict=True):
            weight.set_decode_copy(view)
        return True

    def part(self, index: int, x: Tensor) -> Tensor | None:
        """Returns the product `(rows, out)` for one layer; None once a weight has changed, or the inputs differ."""
        if x is not self._input or x._version != self._version or self._parts[index] is None:
            # A part that nobody took was computed for nothing: these layers do not share their inputs any more.
            self._is_shared = self._is_shared and not any(part is not None for part in self._parts)
            pairs = zip(self._weights, self._views, strict=True)
            is_joined = all(weight.decode_copy is view for weight, view in pairs)  # not if others joined them since
            if not self._is_shared or not (is_joined or self._join()):
                self._forget()
                return None
            first = self._weights[0]
            whole = copy_product(x.reshape(-1, x.shape[-1]), self._copy, first.format, first.blocksize)
            self._input, self._version, self._parts = x, x._version, list(whole.split(self._sizes, dim=1))
        part, self._parts[index] = self._parts[index], None
        if not any(part is not None for part in self._parts):
            self._forget()
        return None if part is None else part.contiguous()

    def _forget(self) -> None:
        self._input, self._parts = None, [None] * len(self._parts)


class Siblings:
    """The packed linear layers of one module: in the first small step it is seen which of them share an input."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._seen: list[tuple[int, Tensor]] = []
        self._is_learning = True
        self._joined: dict[int, tuple[JoinedProduct, int]] = {}

    def forward(self, index: int, own: Forward, x: Tensor) -> Tensor:
        """The forward of the layer of this index; own: its forward without joined products."""
        if not isinstance(x, Tensor) or not _suits(x):
            return own(x)
        if self._is_learning:
            self._learn(index, x)
        layer: Any = self._layers[index]
        if index not in self._joined or not _is_plain(layer):
            return own(x)
        product, place = self._joined[index]
        y = product.part(place, x)
        if y is None:
            return own(x)
        if layer.bias is not None:
            y.add_(layer.bias.to(y.dtype))
        if isinstance(layer, LoraLayer) and layer.adapter_enabled:
            add_few_rows_update_(y, x.reshape(-1, x.shape[-1]), layer.factors, layer.scaling)
        return y.view(*x.shape[:-1], -1)

    def _learn(self, index: int, x: Tensor) -> None:
        if any(index == seen for seen, _ in self._seen):  # the second step
            self._is_learning = False
            for group in self._groups():
                weights = [base.weight for base in map(_base_of, (self._layers[i] for i in group)) if base is not None]
                if len(weights) == len(group):
                    product = JoinedProduct(weights)
                    self._joined |= {layer: (product, place) for place, layer in enumerate(group)}
            self._seen = []
        else:
            self._seen.append((index, x))

    def _groups(self) -> list[list[int]]:
        """The indices of layers that got the same tensor, where there are several."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for index, x in self._seen:
            base = _base_of(self._layers[index])
            if base is not None:
                weight = base.weight
                key = id(x), weight.shape[1], weight.format, weight.blocksize
                groups.setdefault(key, []).append(index)
        return [group for group in groups.values() if len(group) > 1]


@contextmanager
def joined_products(model: nn.Module) -> Iterator[None]:
    """Within the block, layers of a model whose codes have copies are multiplied at once where they share an input."""
    with ExitStack() as stack:
        for parent in model.modules():
            if isinstance(parent, LoraLayer):
                continue
            layers = [child for child in parent.children() if _base_of(child) and "forward" not in vars(child)]
            siblings = Siblings(layers)
            for index, layer in enumerate(layers if len(layers) > 1 else ()):
                forward = functools.partial(siblings.forward, index, layer.forward)
                stack.enter_context(patched_forward(layer, forward))
        yield
