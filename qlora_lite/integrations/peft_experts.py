"""peft's `target_parameters` on packed stacks of experts.

peft adapts a parameter by a wrapper around the module that holds it, one inside the other for several parameters. In
each forward it adds B A of all experts to the parameter. Here the wrapper hands A and B to `RoutedExperts`, which
multiplies each expert's matrix and its A and B separately (quantization/experts.py). Names and shapes are peft's.

peft looks for targets among the parameters of modules, and a packed stack is none. Within `stacks_as_parameters` it is
listed as one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn

from qlora_lite.checks import cast_finite
from qlora_lite.compute.weight_update import Delta
from qlora_lite.errors import TargetError
from qlora_lite.integrations.peft_merging import MergedBeside
from qlora_lite.lora.peft.experts import unflatten_A, unflatten_B
from qlora_lite.quantization.experts import PackedStack, RoutedExperts


@dataclass(frozen=True)
class AdaptedStack:
    """What `RoutedExperts` reads of a stack with adapters: its weight, and A and B with their scaling, or None."""

    weight: Tensor | PackedStack
    lora: tuple[Tensor, Tensor] | None
    scaling: float = 1.0

    def current_weights(self) -> tuple[Tensor | PackedStack, tuple[Tensor, Tensor] | None]:
        """Returns the weight, and A `(experts, rank, in)` and B `(experts, out, rank)`."""
        return self.weight, self.lora


@contextmanager
def _attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Within the block, a module has this attribute in front of its parameter, part or method of the same name."""
    vars(module)[name] = value
    try:
        yield
    finally:
        del vars(module)[name]


class ParamWrapper(MergedBeside, peft_layers.ParamWrapper):  # type: ignore[misc]  # peft looks for this name of a class
    """peft's LoRA layer around a module of experts, for one of its stacks, packed or not:

        y = W0_e x + b_e + scaling * B_e A_e x for each expert e

    of which the active adapters are one term. Merged, the experts use a stack that is computed beside the base.
    """

    def _factors(self, adapters: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns A `(experts, ranks, in)` and B `(experts, out, ranks)` of these adapters, B times their scaling."""
        all_A = [unflatten_A(self.lora_A[name].weight, self.num_experts) for name in adapters]
        all_B = [self.scaling[name] * unflatten_B(self.lora_B[name].weight, self.num_experts) for name in adapters]
        return torch.cat(all_A, 1), torch.cat(all_B, 2)

    @contextmanager
    def _activate_lora(self, active_adapters: Sequence[str]) -> Iterator[None]:
        adapters = [name for name in active_adapters if name in self.lora_A]
        if not adapters:
            yield
            return
        shown = AdaptedStack(self.get_param(), self._factors(adapters))
        with _attribute(self.get_base_layer(), self.parameter_name, shown):
            yield

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Returns the output of the experts."""
        if self.merged_weight is None or self.disable_adapters:
            y: Tensor = super().forward(x, *args, **options)
            return y
        self._check_forward_args(x, *args, **options)
        with _attribute(self.get_base_layer(), self.parameter_name, AdaptedStack(self.merged_weight, None)):
            return self.base_layer(x, *args, **options)  # type: ignore[no-any-return]

    def _merged_values(self, adapters: Sequence[str]) -> tuple[Tensor, None]:
        stack, matrices = self.get_param(), []
        transposed = bool(self.get_base_layer().is_transposed)
        for expert, (lora_A, lora_B) in enumerate(zip(*self._factors(adapters), strict=True)):
            if isinstance(stack, PackedStack):
                matrix = stack[expert].dequantize(torch.float32)
            else:
                part = stack[expert].mT if transposed else stack[expert]
                matrix = part.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            matrix = Delta(lora_B.float().contiguous(), lora_A.float(), 1.0).add_to_(matrix, 0)
            name = f"{self.parameter_name} of expert {expert} merged with {', '.join(adapters)}"
            matrix = cast_finite(matrix, stack.dtype, name)
            matrices.append(matrix.mT if transposed else matrix)
        return torch.stack(matrices).contiguous(), None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Returns the experts, with plain stacks where adapters are merged: transformers' own if none is packed."""
        layer: Any = self
        experts: Any = self.get_base_layer()
        while isinstance(layer, peft_layers.ParamWrapper):
            if merge:
                layer.merge(safe_merge, adapter_names)
            if isinstance(layer, ParamWrapper) and layer.merged_weight is not None:
                delattr(experts, layer.parameter_name)
                values = nn.Parameter(layer.merged_weight, requires_grad=False)
                experts.register_parameter(layer.parameter_name, values)
            layer = layer.base_layer
        return experts.as_plain() or experts  # type: ignore[no-any-return]


def wrapped_experts(
    target: Any, adapter_name: str, *, config: Any, parameter_name: str | None, **options: Any
) -> nn.Module:
    """Returns peft's wrapper around experts for a parameter of theirs: the one of this file for a stack."""
    experts = target
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    if parameter_name is None:
        stacks = ", ".join(experts.stack_names)
        raise TargetError(f"a module of experts is adapted by its stacks: name them in target_parameters ({stacks})")
    kind = ParamWrapper if parameter_name in experts.stack_names else peft_layers.ParamWrapper
    return kind(target, adapter_name, parameter_name, config, **options)


def passed_over(target: PackedStack, adapter_name: str, **options: Any) -> PackedStack:
    """Returns a stack as it is where target_modules name it together with linear layers: in peft it is no module."""
    return target


def _with_stacks(experts: RoutedExperts, prefix: str = "", recurse: bool = True, **options: bool) -> Iterator[Any]:
    """`named_parameters` of a module of experts, whose own ones have stand-ins on meta for packed stacks among them."""
    if recurse:
        yield from type(experts).named_parameters(experts, prefix, recurse, **options)
        return
    for name in experts._plain[0]._parameters:  # in the order in which transformers declares them
        held = getattr(experts, name)
        if isinstance(held, PackedStack):
            held = nn.Parameter(torch.empty(held.shape, dtype=held.dtype, device="meta"), requires_grad=False)
        if held is not None:
            yield f"{prefix}.{name}" if prefix else name, held


@contextmanager
def stacks_as_parameters(model: nn.Module) -> Iterator[None]:
    """Within the block, packed stacks are among the parameters of their modules, where peft looks for targets."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, RoutedExperts):
                stack.enter_context(_attribute(module, "named_parameters", functools.partial(_with_stacks, module)))
                # peft asks it for its device.
                stack.enter_context(_attribute(module, "weight", getattr(module, module.stack_names[0])))
        yield
