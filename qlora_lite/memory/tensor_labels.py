"""Labels the tensors of a model and an optimizer in a trace: their category, and the module that holds them.

Packed weights of this package and of bitsandbytes are known. A `Linear4bit` of bitsandbytes keeps the statistics of its
packed weight in the weight's `quant_state`; a `Linear8bitLt` keeps codes in `CB` and statistics in `SCB`, each on the
weight or in the layer's `state`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from qlora_lite.lora.adapters import InactiveAdapters
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.storages import tensors_in
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.quantization.packed_weight import PackedWeight

# Tensors of bitsandbytes' QuantState. `state2` is a QuantState of the statistics themselves (double quantization).
STATISTICS_4BIT = ("absmax", "code", "offset")
NESTED_STATE = "state2"
STATISTICS_8BIT = "SCB"
CODES_8BIT = "CB"


def _statistics(parameter: Tensor, module: nn.Module) -> Iterator[Tensor]:
    """Yields the statistics that bitsandbytes keeps next to a packed parameter, which are not buffers of a module."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from tensors_in([getattr(state, name, None) for name in STATISTICS_4BIT])
        state = getattr(state, NESTED_STATE, None)
    for owner in (parameter, getattr(module, "state", None)):
        yield from tensors_in(getattr(owner, STATISTICS_8BIT, None))


def _codes(parameter: Tensor, module: nn.Module) -> Iterator[Tensor]:
    """Yields a parameter, and the packed codes that bitsandbytes keeps apart from it."""
    yield parameter
    for owner in (parameter, getattr(module, "state", None)):
        yield from tensors_in(getattr(owner, CODES_8BIT, None))


class TensorLabeler:
    """Labels the tensors of one model and one optimizer, both referenced weakly.

    Trained parameters are ADAPTER, their gradients GRADIENT, their optimizer states OPTIMIZER_STATE, statistics of
    packed weights QUANT_STATE, all other parameters and buffers BASE_WEIGHT.
    """

    def __init__(self) -> None:
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._optimizer: Callable[[], Optimizer | None] = lambda: None
        self._gradient_hooks = WeakIdKeyDictionary()

    def track(self, model: nn.Module | None = None, optimizer: Optimizer | None = None) -> None:
        """Sets the model and the optimizer; None leaves the previous one."""
        if model is not None:
            self._model = weakref.ref(model)
        if optimizer is not None:
            self._optimizer = weakref.ref(optimizer)

    def label(self, trace: StorageTrace) -> None:
        """Labels every tensor that the model and the optimizer hold now, and hooks gradients that are still to come."""
        model, optimizer = self._model(), self._optimizer()
        owners: dict[int, str] = {}
        if model is not None:
            trace.track_modules(model)
            for name, module in model.named_modules():
                self._label_module(trace, name, module, owners)
                if isinstance(module, InactiveAdapters):
                    _label_inactive(trace, module)
        if optimizer is not None:
            for parameter, state in optimizer.state.items():
                for tensor in tensors_in(state):
                    trace.label(tensor, Category.OPTIMIZER_STATE, owners.get(id(parameter)))

    def remove_hooks(self) -> None:
        """Removes the hooks on gradients."""
        for hook in self._gradient_hooks.values():
            hook.remove()
        self._gradient_hooks.clear()

    def _label_module(self, trace: StorageTrace, name: str, module: nn.Module, owners: dict[int, str]) -> None:
        """Labels the tensors that a module holds itself; those of a packed weight belong to the layer around it."""
        packed = isinstance(module, PackedWeight)
        owner = name.rpartition(".")[0] if packed else name
        for key, buffer in module.named_buffers(recurse=False):
            is_statistic = packed and key != "packed"
            trace.label(buffer, Category.QUANT_STATE if is_statistic else Category.BASE_WEIGHT, owner)
        for _, parameter in module.named_parameters(recurse=False):
            # A tied parameter belongs to the first module that holds it.
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
    """Labels inactive adapters under the layers that they belong to."""
    for layers in inactive.adapters.values():
        for name, layer in layers.items():
            for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
                trace.label(tensor, Category.ADAPTER, name)


def _hook_gradient(trace: StorageTrace, parameter: Tensor, owner: str) -> RemovableHandle:
    # Without the hook, a gradient that is freed within the phase that created it would never be labelled.
    hook: RemovableHandle = parameter.register_post_accumulate_grad_hook(
        lambda updated: _label_gradient(trace, updated, owner)
    )
    return hook


def _label_gradient(trace: StorageTrace, parameter: Tensor, owner: str) -> None:
    if parameter.grad is not None:
        trace.label(parameter.grad, Category.GRADIENT, owner)
