"""Activation checkpointing as a dial: keep all of a block for backward, or its input only and compute the rest again.

(arXiv:1604.06174.) Between "none" (keep all) and "full" (recompute all) a number of bytes may be given: then as many
blocks are kept as it allows. Which those are follows from the first step, in which one block is kept and every
storage is followed: its peak, and the bytes that the kept block cost. Both grow with the tokens of a batch, so the
number of kept blocks is found anew for each batch. The last blocks are kept: backward frees them first, so that
nothing of theirs is left when others recompute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.trace import StorageTrace, storages_of

# Allocations that differ from batch to batch (other lengths, other numbers of labels) at the same number of tokens.
MARGIN = 0.03


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the children of its outermost ModuleLists."""
    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                blocks.extend(child)
            else:
                visit(child)

    visit(model)
    return blocks


def _bytes_of(tensors: Iterator[Tensor]) -> dict[int, int]:
    return {storage.data_ptr(): storage.nbytes() for tensor in tensors for storage in storages_of(tensor)}


class Dial:
    """How many of a model's blocks are kept for backward; the others recompute. Set for each batch by `prepare`."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module], kind: str | int) -> None:
        self._model, self._kind = model, kind
        self.blocks = len(blocks)
        self.kept = self.blocks if kind == "none" else 0
        self._block_bytes: dict[int, int] | None = None
        self._peak, self._tokens = 0, 0

    def run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's forward, checkpointed or not."""
        if index < self.blocks - self.kept:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if self._block_bytes is None or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            return forward(*args, **kwargs)

    def _note(self, tensor: Tensor) -> Tensor:
        assert self._block_bytes is not None
        self._block_bytes |= _bytes_of(iter((tensor,)))
        return tensor

    @contextmanager
    def batch(self, tokens: int, state_bytes: int) -> Iterator[None]:
        """Forward and backward of a batch go inside. state_bytes: what the optimizer's states take, or will take.

        ConfigError for a budget that not even recomputing everything can meet.
        """
        if isinstance(self._kind, str):
            yield
        elif self._tokens:
            self.kept = self._fitting(tokens, state_bytes)
            yield
        else:
            with self._measuring(tokens):
                yield
            self._fitting(tokens, state_bytes)

    @contextmanager
    def _measuring(self, tokens: int) -> Iterator[None]:
        """Keeps one block, and finds what that costs and what the peak is."""
        self.kept, self._block_bytes = 1, {}
        resident = [*self._model.parameters(), *self._model.buffers()]
        with StorageTrace() as trace:
            for tensor in resident:
                trace.label(tensor, Category.BASE_WEIGHT)
            yield
        own = _bytes_of(iter(resident))
        self._cost = sum(size for place, size in self._block_bytes.items() if place not in own)
        self._block_bytes = None
        self._peak = trace.peak()[0] - sum(own.values())
        self._tokens = tokens

    def _fitting(self, tokens: int, state_bytes: int) -> int:
        """The number of blocks that can be kept. Gradients are counted as if they too grew with the tokens."""
        assert isinstance(self._kind, int)
        scale = (1 + MARGIN) * max(tokens, 1) / self._tokens
        all_recomputed = (self._peak - self._cost) * scale + state_bytes
        if all_recomputed > self._kind:
            raise ConfigError(
                f"checkpointing={self._kind} bytes cannot be met: recomputing every block needs "
                f"{round(all_recomputed)} for a batch of {tokens} tokens; give more, or smaller batches"
            )
        return min(self.blocks, int((self._kind - all_recomputed) / max(1.0, self._cost * scale)))


@contextmanager
def checkpointed(model: nn.Module, kind: str | int) -> Iterator[Dial]:
    """Within the block, the repeated blocks of the model recompute in backward as `kind` says (see TrainConfig).

    Non-reentrant, so a frozen embedding (an input without gradient) is no obstacle. Forward methods are put back
    afterwards. ConfigError when the model has no ModuleList of blocks.
    """
    blocks = [] if kind == "none" else repeated_blocks(model)
    if kind != "none" and not blocks:
        raise ConfigError(f"checkpointing={kind!r} needs blocks in an nn.ModuleList; this model has none: use 'none'")
    dial = Dial(model, blocks, kind)
    originals: list[tuple[nn.Module, Any]] = [(block, block.__dict__.get("forward")) for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = functools.partial(dial.run, index, block.forward)
    try:
        yield dial
    finally:
        for block, original in originals:
            if original is None:
                del block.forward
            else:
                block.forward = original
