"""Activation checkpointing as a dial: keep a block for backward, or its input only and compute the rest again.

(arXiv:1604.06174.) "Keep" means what is dear to compute, products and attention; norms and activations are computed
again in any case (recompute.py). Between "none" (recompute no block) and "full" (recompute all) a number of bytes may
be given. Then as much is kept as it allows, what saves the most time a byte first: the outputs of attention in as
many blocks as fit, and when they fit in all, whole blocks. How much that is follows from the first step, in which one
block is kept and every storage is followed. All grows with the tokens of a batch, so the numbers are found anew for
each batch. The last blocks are kept: backward frees them first, so nothing of theirs is left when others recompute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_lite.compute.cpu_attention import OutputStash
from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.storages import storages_of
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.patches import patched_forward
from qlora_lite.surgery import repeated_blocks

# Allocations that differ from batch to batch (other lengths, other numbers of labels) at the same number of tokens.
MARGIN = 0.03


PHASES = ("forward", "backward")


class _Cost(NamedTuple):
    """Bytes of a batch with one block kept: peaks of its phases, that block, the attention outputs in it."""

    tokens: int
    forward: int
    backward: int
    block: int
    attention: int


def _bytes_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """By identity: fake storages have no address."""
    return {id(storage): storage.nbytes() for tensor in tensors for storage in storages_of(tensor)}


Phase = Callable[[str], AbstractContextManager[None]]


class Dial:
    """Which of a model's blocks are kept for backward, and of which of the others the attention outputs.

    Set for each batch by `batch`.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], kind: str | int) -> None:
        self._model, self._kind = model, kind
        self.blocks = len(blocks)
        self.kept = self.blocks if kind == "none" else 0
        self.attention_kept = 0
        self._cost: _Cost | None = None
        self._noted: dict[int, int] | None = None
        self._attention_bytes = 0

    @property
    def measured(self) -> list[int] | None:
        """What blocks cost in the first batch, if that was measured; a dial that is given it decides the same."""
        return None if self._cost is None else list(self._cost)

    @measured.setter
    def measured(self, cost: list[int] | None) -> None:
        self._cost = None if cost is None else _Cost(*cost)

    def run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's forward, checkpointed or not."""
        recomputed = self.blocks - self.kept
        if index < recomputed - self.attention_kept:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if index < recomputed:
            stash = OutputStash()

            def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
                return stash.filling(), stash.using()

            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        if self._noted is None or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        stash = OutputStash()
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor), stash.filling():
            result = forward(*args, **kwargs)
        # A recomputed block holds its input too.
        for storage in _bytes_of(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)):
            self._noted.pop(storage, None)
        self._attention_bytes = sum(_bytes_of(stash.outputs).values())
        return result

    def _note(self, tensor: Tensor) -> Tensor:
        assert self._noted is not None
        self._noted |= _bytes_of((tensor,))
        return tensor

    @contextmanager
    def batch(self, tokens: int, state_bytes: int) -> Iterator[Phase]:
        """A batch of a step goes inside; the phases `forward` and `backward` of it into what this gives.

        state_bytes: what the optimizer's states take, or will take. ConfigError for a budget that not even
        recomputing everything can meet.
        """
        if isinstance(self._kind, str):
            yield lambda name: nullcontext()
        elif self._cost is not None:
            self._fit(self._kind, tokens, state_bytes)
            yield lambda name: nullcontext()
        else:
            with self._measuring(tokens) as phase:
                yield phase
            self._fit(self._kind, tokens, state_bytes)

    @contextmanager
    def _measuring(self, tokens: int) -> Iterator[Phase]:
        """Keeps one block, and finds what that costs and what the peaks are."""
        self.kept, self._noted = 1, {}
        resident = [*self._model.parameters(), *self._model.buffers()]
        with StorageTrace() as trace:
            for tensor in resident:
                trace.label(tensor, Category.BASE_WEIGHT)
            yield trace.phase
        own = _bytes_of(resident)
        base = sum(own.values())
        block = sum(size for place, size in self._noted.items() if place not in own)
        self._noted = None
        forward, backward = (trace.peak(name)[0] - base for name in PHASES)
        self._cost = _Cost(tokens, forward, backward, block, self._attention_bytes)

    def _fit(self, budget: int, tokens: int, state_bytes: int) -> None:
        """Sets how much is kept. Gradients are counted as if they too grew with the tokens."""
        assert self._cost is not None
        scale = (1 + MARGIN) * max(tokens, 1) / self._cost.tokens
        forward, backward, block, attention = (size * scale for size in self._cost[1:])
        # Backward holds a whole block anyway where it recomputes one, so the first kept block costs it nothing.
        needed = max(forward - block, backward) + state_bytes
        if needed > budget:
            raise ConfigError(
                f"checkpointing={budget} bytes cannot be met: recomputing every block needs "
                f"{round(needed)} for a batch of {tokens} tokens; give more, or smaller batches"
            )
        room = max(0.0, budget - max(forward, backward) + block - state_bytes)
        beside = max(1.0, block - attention)  # what a kept block costs where its attention outputs are kept anyway
        self.kept = max(0, min(self.blocks, int((room - attention * self.blocks) / beside)))
        left = self.blocks - self.kept
        self.attention_kept = min(left, int((room - self.kept * block) / attention)) if attention else 0


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
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(patched_forward(block, functools.partial(dial.run, index, block.forward)))
        yield dial
