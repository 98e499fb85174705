"""How autograd nodes keep less for backward: three mechanisms that reach beyond a node of its own.

1. Recomputable tensors. The output of a norm or a gated activation is cheap to compute and expensive to keep, and every
   linear layer that reads it would keep it. Its maker attaches a `Recomputation` to it as an attribute: a function f
   and inputs p, which some node keeps in any case, with f(*p) equal to the tensor bit for bit. A node that would keep
   the tensor keeps p instead, and computes f(*p) in backward, once for all nodes that read the tensor.
   Limits: the attribute belongs to one tensor object, so views, copies and casts do not have it, and a tensor that was
   changed in place since (`_version`) counts as one without. Nothing is attached while gradients are disabled.

2. Tensors saved by another node. `saving_node(y)` is the autograd node that made y. A node that is computed later from
   the same values reads `saved_tensors` there in its backward, instead of saving them itself. Reason: non-reentrant
   checkpointing recomputes a block only up to the last tensor that was saved in it. If the last product saves
   nothing, it is not computed again. Limits: y must require a gradient, the reading node must take y as an input, so
   that its backward runs first (the engine frees what a node saved after that node's own backward), and gradients of
   gradients are not supported.

3. Outputs that recomputation reuses. A checkpointed block computes its attention twice. `OutputStash` keeps the outputs
   of the first forward, and hands them out in the same order in the second. Limits: the block must make the same calls
   in the same order both times, and the stash is a context variable, so both have to run in the thread that entered it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, cast

import torch
from torch import Tensor


class SharedResult:
    """The result of a function that several nodes need in backward: computed once, held until the last has read it."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._readers = 0
        self._value: Tensor | None = None

    def expect_reader(self) -> None:
        """Announces in forward that a node will call `read` in backward."""
        self._readers += 1

    def read(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Returns the result, computed from the inputs that the node kept.

        Reads beyond those announced, as with retain_graph, compute it each time.
        """
        value = self._function(*inputs) if self._value is None else self._value
        self._readers -= 1
        self._value = value if self._readers > 0 else None
        return value


class Recomputation:
    """How a tensor is computed again, bit for bit: `function(*inputs)`; `version` is the tensor's at that time."""

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor, version: int = 0) -> None:
        self.result, self.inputs, self.version = SharedResult(function), inputs, version


def recomputable(tensor: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Attaches to a tensor how it is computed again, if gradients are enabled. Returns the same tensor."""
    if torch.is_grad_enabled():
        tensor.recomputation = Recomputation(function, *inputs, version=tensor._version)  # type: ignore[attr-defined]
    return tensor


def recomputation_of(tensor: Tensor) -> Recomputation | None:
    """Returns how this tensor object is computed again, None if that is unknown or the tensor was changed in place."""
    found: Recomputation | None = getattr(tensor, "recomputation", None)
    return None if found is None or found.version != tensor._version else found


class SavingNode(Protocol):
    """An autograd node as another node sees it in backward."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that it saved; under checkpointing, reading them recomputes the block."""


def saving_node(tensor: Tensor) -> SavingNode | None:
    """Returns the autograd node that made a tensor, None for a tensor without a gradient."""
    return cast("SavingNode | None", tensor.grad_fn)


_stash: ContextVar[tuple[list[Tensor], bool] | None] = ContextVar(
    "stash of outputs, and whether it fills", default=None
)


class OutputStash:
    """Outputs of the attention calls in a block, in order: kept within `filling()`, handed out within `using()`."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    @contextmanager
    def filling(self) -> Iterator[None]:
        with _active(self.outputs, True):
            yield

    @contextmanager
    def using(self) -> Iterator[None]:
        outputs, self.outputs = self.outputs, []
        with _active(outputs, False):
            yield


@contextmanager
def _active(outputs: list[Tensor], fills: bool) -> Iterator[None]:
    token = _stash.set((outputs, fills))
    try:
        yield
    finally:
        _stash.reset(token)


def stashed_output() -> Tensor | None:
    """Returns the next output of the active stash if it is being used and has one left, else None."""
    outputs, fills = _stash.get() or ([], False)
    return outputs.pop(0) if outputs and not fills else None


def stash_output(output: Tensor) -> None:
    """Adds an output to the active stash, if it is being filled."""
    outputs, fills = _stash.get() or ([], False)
    if fills:
        outputs.append(output.detach())
