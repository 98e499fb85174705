"""Tells a source of bytes when each repeated block of a model is computed, in forward and in backward.

A frozen base is needed one block at a time: in the forward pass from the first block to the last, in the backward pass
from the last to the first. Wherever its bytes lie (on disk, in host memory, in other processes), they can come before a
block is computed and go after it.

Forward: hooks of the block's module, which run around its forward method, whatever that was replaced by (fused
functions, activation checkpointing).
Backward: a hook of the block's output tensor runs when the gradient of that output is complete, before any node of the
block. A block is through when the next one begins, or when the backward pass ends. So nothing is needed of the block's
input, which has no gradient behind a frozen embedding, and no node is added to the graph. Recomputation of a block
happens within its backward, and needs no call of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qlora_lite.surgery import repeated_blocks

FORWARD, BACKWARD = 1, -1
OUTSIDE = -1  # torch's number of the backward pass where none runs


class BlockSource(Protocol):
    """What keeps the bytes of blocks. Blocks have the numbers that they have in `repeated_blocks`, from 0.

    At most one block is there at a time: between `arrive(b)` and the next `leave(b)` no other block arrives.
    """

    def arrive(self, block: int) -> None:
        """Returns once the bytes of a block can be read; called before its forward, and before its backward."""

    def next(self, block: int) -> None:
        """Hints that a block will probably arrive after the one that just did."""

    def leave(self, block: int) -> None:
        """The bytes of a block are not read until it arrives again; called after its forward, and its backward."""


class _BlockOrder:
    """Calls of a source by the hooks of the blocks."""

    def __init__(self, source: BlockSource, blocks: int) -> None:
        self._source, self._blocks = source, blocks
        self._here: int | None = None
        self._backward_pass = OUTSIDE  # the last one whose end is awaited

    def _arrive(self, block: int, direction: int) -> None:
        if self._here == block:
            return
        self._leave()
        self._source.arrive(block)
        self._here = block
        if 0 <= block + direction < self._blocks:
            self._source.next(block + direction)

    def _leave(self) -> None:
        here, self._here = self._here, None
        if here is not None:
            self._source.leave(here)

    def _is_recomputing(self, block: int) -> bool:
        """Whether a block's forward runs within its backward, called by a library that recomputes whole modules."""
        return self._here == block and torch._C._current_graph_task_id() != OUTSIDE

    def before_forward(self, block: int, module: nn.Module, args: Any) -> None:
        if not self._is_recomputing(block):
            self._arrive(block, FORWARD)

    def after_forward(self, block: int, module: nn.Module, args: Any, result: Any) -> None:
        if self._is_recomputing(block):
            return
        if self._here == block:
            self._leave()
        output = next((value for value in _values(result) if isinstance(value, Tensor) and value.requires_grad), None)
        if output is not None and torch.is_grad_enabled():
            output.register_hook(functools.partial(self.before_backward, block))

    def before_backward(self, block: int, gradient: Tensor) -> None:
        this_pass = torch._C._current_graph_task_id()
        if self._backward_pass != this_pass:
            self._backward_pass = this_pass
            at_end: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback
            at_end(self._leave)
        self._arrive(block, BACKWARD)


def _values(result: Any) -> Iterable[Any]:
    if isinstance(result, dict):
        return result.values()
    return result if isinstance(result, (tuple, list)) else (result,)


def follow_blocks_(model: nn.Module, source: BlockSource) -> list[RemovableHandle]:
    """Tells a source about the blocks of a model from now on; returns the handles of the hooks that it adds.

    The calls of one pass: `arrive(b)`, then `next` with b + 1 in forward or b - 1 in backward if there is one, then
    `leave(b)`. A block that no gradient reaches does not arrive in backward. A forward that raises is followed by
    `leave`; after a backward that raised, `leave` comes with the next block.
    """
    blocks = list(dict.fromkeys(repeated_blocks(model)))
    order = _BlockOrder(source, len(blocks))
    handles = []
    for number, block in enumerate(blocks):
        before = functools.partial(order.before_forward, number)
        after = functools.partial(order.after_forward, number)
        handles.append(block.register_forward_pre_hook(before))
        handles.append(block.register_forward_hook(after, always_call=True))
    return handles


@contextmanager
def followed_blocks(model: nn.Module, source: BlockSource) -> Iterator[None]:
    """Within the block a source is told about the blocks of a model, as by `follow_blocks_`."""
    handles = follow_blocks_(model, source)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
