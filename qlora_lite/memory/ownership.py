"""Tells a trace which tensors are weights, statistics, adapters, gradients and optimizer states, and of which module.

Ours and bitsandbytes': a `Linear4bit` keeps the statistics of its packed weight in a quant_state beside it, a
`Linear8bitLt` in `SCB`, on the weight or in its state.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from qlora_lite.lora.adapters import InactiveAdapters
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.quantization.packed_weight import PackedWeight

# Tensors of bitsandbytes' QuantState; state2 is another one, of the statistics themselves.
STATISTICS_4BIT = ("absmax", "code", "offset")
NESTED = "state2"
STATISTICS_8BIT = "SCB"
CODES_8BIT = "CB"


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an optimizer's state of one parameter, which may be nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


def _statistics(parameter: Any, module: nn.Module) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside a packed parameter, and no module has as a buffer."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from _tensors_in([getattr(state, name, None) for name in STATISTICS_4BIT])
        state = getattr(state, NESTED, None)
    for owner in (parameter, getattr(module, "state", None)):
        yield from _tensors_in([getattr(owner, STATISTICS_8BIT, None)])


def _codes(parameter: Any, module: nn.Module) -> Iterator[Tensor]:
    """A parameter's values, and the packed ones that bitsandbytes keeps apart from it."""
    yield parameter
    for owner in (parameter, getattr(module, "state", None)):
        yield from _tensors_in([getattr(owner, CODES_8BIT, None)])


class Ownership:
    """The model and the optimizer whose tensors a trace meets, both referenced weakly.

    What is trained is ADAPTER, its gradients and optimizer states GRADIENT and OPTIMIZER_STATE, statistics of packed
    weights QUANT_STATE, all else in the model BASE_WEIGHT.
    """

    def __init__(self) -> None:
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._optimizer: Callable[[], Any | None] = lambda: None
        self._gradient_hooks = WeakIdKeyDictionary()

    def track(self, model: nn.Module | None = None, optimizer: Any | None = None) -> None:
        """Says which model and optimizer; what is not given stays as it was."""
        if model is not None:
            self._model = weakref.ref(model)
        if optimizer is not None:
            self._optimizer = weakref.ref(optimizer)

    def label(self, trace: StorageTrace) -> None:
        """Labels what both hold by now, and from now on the gradients of what is trained when they are made."""
        model, optimizer = self._model(), self._optimizer()
        owners: dict[int, str] = {}
        if model is not None:
            trace.follow(model)
            for name, module in model.named_modules():
                self._label_module(trace, name, module, owners)
                if isinstance(module, InactiveAdapters):
                    _label_inactive(trace, module)
        if optimizer is not None:
            for parameter, state in optimizer.state.items():
                for tensor in _tensors_in(state):
                    trace.label(tensor, Category.OPTIMIZER_STATE, owners.get(id(parameter)))

    def let_go(self) -> None:
        """Removes all hooks."""
        for hook in self._gradient_hooks.values():
            hook.remove()
        self._gradient_hooks.clear()

    def _label_module(self, trace: StorageTrace, name: str, module: nn.Module, owners: dict[int, str]) -> None:
        """Labels what a module holds itself. The statistics of a packed weight go to the layer that it belongs to."""
        packed = isinstance(module, PackedWeight)
        owner = name.rpartition(".")[0] if packed else name
        for key, buffer in module.named_buffers(recurse=False):
            statistics = packed and key != "packed"
            trace.label(buffer, Category.QUANT_STATE if statistics else Category.BASE_WEIGHT, owner)
        for _, parameter in module.named_parameters(recurse=False):
            # A tied parameter is met again under its other names.
            if id(parameter) in owners:
                continue
            owners[id(parameter)] = owner
            for codes in _codes(parameter, module):
                trace.label(codes, Category.ADAPTER if parameter.requires_grad else Category.BASE_WEIGHT, owner)
            for statistic in _statistics(parameter, module):
                trace.label(statistic, Category.QUANT_STATE, owner)
            _label_gradient(trace, parameter, owner)
            if parameter.requires_grad and parameter not in self._gradient_hooks:
                self._gradient_hooks[parameter] = _hook_gradient(trace, parameter, owner)


def _label_inactive(trace: StorageTrace, inactive: InactiveAdapters) -> None:
    """Adapters that are not in use are adapters of their layers all the same."""
    for layers in inactive.adapters.values():
        for name, layer in layers.items():
            for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
                trace.label(tensor, Category.ADAPTER, name)


def _hook_gradient(trace: StorageTrace, parameter: Tensor, owner: str) -> Any:
    # Without it, a gradient that is freed within the phase that made it would never be recognized.
    return parameter.register_post_accumulate_grad_hook(lambda made: _label_gradient(trace, made, owner))


def _label_gradient(trace: StorageTrace, parameter: Tensor, owner: str) -> None:
    if parameter.grad is not None:
        trace.label(parameter.grad, Category.GRADIENT, owner)
