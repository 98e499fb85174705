"""Convolutions (nn.Conv1d, nn.Conv2d, nn.Conv3d) with a low-rank term.

    y = K * x + b + scaling * B (A * dropout(x))    `*`: convolution with the layer's stride, padding, dilation, groups

A `(rank, in / groups x kernel)` is a convolution to `rank` channels with all options of the base, and B `(out, rank)`
one of kernel size 1. The update of the kernel K `(out, in / groups, *kernel)`, as a matrix of `out` rows, is
scaling * B A. So it can be merged like that of a linear layer, whatever the options are.

With groups, each group applies the same A to its own inputs, and its own rows of B. peft's A reads the inputs of all
groups instead. That is not an update of K, and cannot be merged.
"""

from __future__ import annotations

import math
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from qlora_lite.compute.lora_linear import AdaptedLayer, with_gain
from qlora_lite.compute.products.frozen_weight import Weight, product_dtype, weight_of
from qlora_lite.compute.weight_update import Delta
from qlora_lite.errors import InputError
from qlora_lite.surgery import has_own_forward

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
# Attributes that models read from their convolutions (Whisper: the strides), forwarded from the base.
FORWARDED_ATTRIBUTES = frozenset(
    {"in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"}
)


def refusal_reason(module: nn.Module) -> str | None:
    """Returns why this convolution cannot be adapted; None if it can be, or is not a convolution."""
    if not isinstance(module, _ConvNd):
        return None
    kind = type(module).__name__
    if isinstance(module, _ConvTransposeNd):
        return f"a {kind} cannot be adapted: transposed convolutions are not supported, neither here nor by peft"
    plain = next((plain for plain in CONVOLUTIONS if isinstance(module, plain)), None)
    if plain is None or has_own_forward(module) or type(module)._conv_forward is not plain._conv_forward:
        return f"a {kind} cannot be adapted: it has its own forward, which the adapted layer would not run"
    weight = module._parameters.get("weight")
    if weight is None:
        return f"this {kind} cannot be adapted: each call makes its kernel of other parameters (as weight norm does)"
    if is_lazy(weight):
        return f"this {kind} cannot be adapted: it is lazy and has no kernel before its first call"
    return None


def _check_input(base: _ConvNd, x: object) -> None:
    """Raises InputError unless x is a tensor of floats, `(batch, in, *space)` or `(in, *space)`."""
    space = base.weight.dim() - 2
    fits = isinstance(x, Tensor) and x.is_floating_point() and x.dim() in (space + 1, space + 2)
    if not fits or x.shape[-space - 1] != base.in_channels:  # type: ignore[attr-defined]
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError(
            f"this layer takes floats with {base.in_channels} channels and {space} dimensions of space; got {got}"
        )


def _convolve(base: _ConvNd, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Returns kernel * x + bias with the options of the base."""
    result: Tensor = cast("nn.Conv1d | nn.Conv2d | nn.Conv3d", base)._conv_forward(x, kernel, bias)
    return result


class ConvKind:
    title: ClassVar[str] = "a convolution"

    def features(self, base: nn.Module) -> tuple[int, int]:
        out, *rest = weight_of(base).shape
        return math.prod(rest), out

    def apply(
        self,
        layer: AdaptedLayer,
        x: Tensor,
        weight: Weight,
        lora: tuple[Tensor, Tensor] | None,
        gain: Tensor | None = None,
    ) -> Tensor:
        base = layer.base_layer
        assert isinstance(base, _ConvNd) and isinstance(weight, Tensor)
        _check_input(base, x)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # As for torch's own convolutions. Autocast is off inside, so that it does not change the dtypes again.
            x = x.to(torch.get_autocast_dtype(device))
        dtype = product_dtype(x, None)
        per_channel = (-1, *(1,) * (weight.dim() - 2))
        bias = None if layer.bias is None else layer.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            inputs = x.to(dtype)
            y = _convolve(base, inputs, weight.to(dtype), bias if gain is None else None)
            if lora is not None:
                y = torch.add(y, self._low_rank(layer, base, inputs, *lora), alpha=layer.scaling)
            if gain is not None:
                y = with_gain(y, gain.view(per_channel))
                y = y if bias is None else y + bias.view(per_channel)
        return y.to(x.dtype)

    def _low_rank(self, layer: AdaptedLayer, base: _ConvNd, inputs: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """Returns B (A * dropout(x))."""
        kernel = lora_A.to(inputs.dtype).view(-1, *base.weight.shape[1:])
        kernel = kernel.repeat(base.groups, *(1,) * (kernel.dim() - 1))  # the same A for every group
        low = _convolve(base, F.dropout(inputs, layer.dropout, layer.training), kernel, None)
        convolve = next(convolve for plain, convolve in CONVOLUTIONS.items() if isinstance(base, plain))
        points = lora_B.to(inputs.dtype).view(*lora_B.shape, *(1,) * (kernel.dim() - 2))
        return convolve(low, points, groups=base.groups)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Delta:
        return Delta(lora_B.float(), lora_A.float(), scaling)

    def file_shapes(self, base: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        out, *rest = weight_of(base).shape
        ones = (1,) * (len(rest) - 1)
        return {"lora_A": (rank, *rest), "lora_B": (out, rank, *ones)}
