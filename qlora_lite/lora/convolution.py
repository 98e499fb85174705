"""How convolutions (nn.Conv1d, nn.Conv2d, nn.Conv3d) apply A and B.

    y = K * x + b + scaling * B (A * x)        `*`: a convolution with the layer's stride, padding, dilation, groups

A `(rank, in / groups x kernel)` is a convolution to `rank` channels, with all the options of the base; B `(out, rank)`
is one of kernel size 1. The update of the kernel K `(out, in / groups, *kernel)`, seen as a matrix of `out` rows, is
scaling * B A: a low-rank term of the weight, as for a linear layer, and so it can be merged whatever the options are.

With groups, each one applies the same A to its own inputs, and its own rows of B. (peft has another thing there: an A
that reads the inputs of all groups, which is no update of K and cannot be merged.)
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from qlora_lite.compute.lora_linear import Adapted, product_dtype, with_gain
from qlora_lite.compute.weight_update import Delta
from qlora_lite.errors import InputError
from qlora_lite.surgery import has_own_forward, is_router

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
# What models ask of their convolutions besides their output (Whisper, of the strides).
OPTIONS = frozenset(
    {"in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"}
)
# What a caller may ask of a kernel that it does not compute with.
FACTS = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta"})


def refusal_reason(module: nn.Module) -> str | None:
    """Why this convolution cannot be adapted; None for one that can be, and for what is no convolution."""
    if not isinstance(module, _ConvNd):
        return None
    kind = type(module).__name__
    if isinstance(module, _ConvTransposeNd):
        return f"a {kind} cannot be adapted: transposed convolutions are not known here, nor to peft"
    plain = next((plain for plain in CONVOLUTIONS if isinstance(module, plain)), None)
    if plain is None or has_own_forward(module) or type(module)._conv_forward is not plain._conv_forward:
        return f"a {kind} cannot be adapted: it has a forward of its own, which a layer in its place would lose"
    weight = module._parameters.get("weight")
    if weight is None:
        return f"this {kind} cannot be adapted: its kernel is made of other parameters in each call (weight norm, say)"
    if is_lazy(weight):
        return f"this {kind} cannot be adapted: it has no kernel before its first call"
    return None


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)


def _reader(parent: type[nn.Module], child: str) -> str | None:
    """The method of this class that computes with `….<child>.weight`; those that only begin it do not count."""
    for owner in parent.__mro__[: parent.__mro__.index(nn.Module)]:
        for name, method in vars(owner).items():
            if not isinstance(method, FunctionType) or "init" in name or "reset" in name:
                continue
            steps = [
                step.argval if "ATTR" in step.opname or "METHOD" in step.opname else None
                for step in _instructions(inspect.unwrap(method).__code__)
            ]
            for first, second, third in zip(steps, steps[1:], [*steps[2:], None], strict=False):
                if (first, second) == (child, "weight") and third not in FACTS:
                    return name
    return None


def weights_read_by_parents(model: nn.Module, names: Iterable[str]) -> list[str]:
    """A sentence for each of these convolutions and routers whose parent reads the weight instead of calling it.

    (As Mamba does.) What an adapter adds would be missing there. Told from the code of the parent's class, where it
    says `self.<name>.weight`.
    """
    problems, modules = [], dict(model.named_modules(remove_duplicate=False))
    for name in names:
        above, _, child = name.rpartition(".")
        module = modules.get(name)
        if module is None or not (isinstance(module, _ConvNd) or is_router(module)):
            continue
        parent = type(model.get_submodule(above))
        if (method := _reader(parent, child)) is not None:
            problems.append(
                f"{name}: {parent.__name__}.{method} reads its weight instead of calling it, which would leave an "
                f"adapter out"
            )
    return problems


def _check_input(base: Any, x: object) -> None:
    """Raises InputError unless x is a tensor of floats, `(batch, in, *places)` or `(in, *places)`."""
    places = base.weight.dim() - 2
    fits = isinstance(x, Tensor) and x.is_floating_point() and x.dim() in (places + 1, places + 2)
    if not fits or x.shape[-places - 1] != base.in_channels:  # type: ignore[attr-defined]
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError(f"this layer takes floats with {base.in_channels} channels and {places} places; got {got}")


class ConvKind:
    title: ClassVar[str] = "a convolution"

    def features(self, base: Any) -> tuple[int, int]:
        return base.weight[0].numel(), base.out_channels

    def apply(
        self, layer: Adapted, x: Tensor, weight: Tensor, lora: tuple[Tensor, Tensor] | None, gain: Tensor | None = None
    ) -> Tensor:
        base: Any = layer.base_layer
        _check_input(base, x)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # As for torch's own convolutions; inside, the dtypes are chosen here and must not be changed again.
            x = x.to(torch.get_autocast_dtype(device))
        dtype = product_dtype(x, None)
        per_channel = (-1, *(1,) * (weight.dim() - 2))
        bias = None if layer.bias is None else layer.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            inputs = x.to(dtype)
            y: Tensor = base._conv_forward(inputs, weight.to(dtype), bias if gain is None else None)
            if lora is not None:
                y = torch.add(y, self._low_rank(layer, inputs, *lora), alpha=layer.scaling)
            if gain is not None:
                y = with_gain(y, gain.view(per_channel))
                y = y if bias is None else y + bias.view(per_channel)
        return y.to(x.dtype)

    def _low_rank(self, layer: Adapted, inputs: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """B (A * dropout(x))."""
        base: Any = layer.base_layer
        kernel = lora_A.to(inputs.dtype).view(-1, *base.weight.shape[1:])
        kernel = kernel.repeat(base.groups, *(1,) * (kernel.dim() - 1))  # the same for the inputs of every group
        low = base._conv_forward(F.dropout(inputs, layer.dropout, layer.training), kernel, None)
        convolve = next(convolve for plain, convolve in CONVOLUTIONS.items() if isinstance(base, plain))
        points = lora_B.to(inputs.dtype).view(*lora_B.shape, *(1,) * (kernel.dim() - 2))
        return convolve(low, points, groups=base.groups)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Delta:
        return Delta(lora_B.float(), lora_A.float(), scaling)

    def file_shapes(self, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        out, *rest = base.weight.shape
        ones = (1,) * (len(rest) - 1)
        return {"lora_A": (rank, *rest), "lora_B": (out, rank, *ones)}
