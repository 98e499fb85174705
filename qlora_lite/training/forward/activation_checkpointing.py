"""Activation checkpointing (arXiv:1604.06174): recomputes all, none or some blocks in backward.

A block that is kept stores the results of its matrix products and of attention for backward. Norms and activations are
recomputed in any case (compute/recompute.py). A block that is recomputed stores its input only.

With a number of bytes, as much is kept as fits, in the order of time saved per byte: the outputs of attention in as
many blocks as possible, and if they fit in all blocks, whole blocks. The sizes are measured in the first batch, in
which one block is kept and every storage is traced. They grow with the number of tokens, so the choice is made for
each batch. The last blocks are kept: backward frees them first, before other blocks are recomputed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_lite import architecture
from qlora_lite.compute.recompute import OutputStash
from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.storages import storages_of
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.patches import patched_forward
from qlora_lite.sharding.base import shares_of
from qlora_lite.surgery import repeated_blocks
from qlora_lite.training.config import NONE

# Batches of the same number of tokens differ in their allocations (other lengths, other numbers of labels).
MARGIN = 0.03
PHASES = ("forward", "backward")

# The names under which blocks get a cache of keys and values.
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")

Phase = Callable[[str], AbstractContextManager[None]]


def _holds_tokens(cache: Any) -> bool:
    """Whether a cache has keys and values of tokens before those of the call."""
    length = getattr(cache, "get_seq_length", None)
    return callable(length) and int(length()) > 0


class _Costs(NamedTuple):
    """Bytes of a batch with one kept block.

    forward, backward: peaks of the phases above the model's own bytes. block: of the kept block. attention: of the
    attention outputs in it.
    """

    tokens: int
    forward: int
    backward: int
    block: int
    attention: int


def _bytes_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Returns the bytes of storages by their id, because fake storages have no address."""
    return {id(storage): storage.nbytes() for tensor in tensors for storage in storages_of(tensor)}


class BlockCheckpointing:
    """Decides for each batch which blocks are kept for backward, and in which others the attention outputs are.

    blocks: the number of blocks. kept: how many of the last ones are kept. attention_kept: of how many blocks before
    these the attention outputs are kept.
    """

    def __init__(self, model: nn.Module, blocks: int, checkpointing: str | int) -> None:
        self._model, self.blocks = model, blocks
        self.set(checkpointing)
        self._costs: _Costs | None = None
        self._saved_bytes: dict[int, int] | None = None  # by storage, of the kept block while it is measured
        self._attention_bytes = 0

    def set(self, checkpointing: str | int) -> None:
        """Decides anew: `none` keeps all blocks, `full` none; a number of bytes is fitted to each batch."""
        self.checkpointing = checkpointing
        self.kept = self.blocks if checkpointing == NONE else 0
        self.attention_kept = 0

    @property
    def costs(self) -> list[int] | None:
        """The measured bytes of a batch (tokens, forward, backward, block, attention); None before the first batch.

        Another instance that is given these costs decides the same.
        """
        return None if self._costs is None else list(self._costs)

    @costs.setter
    def costs(self, costs: list[int] | None) -> None:
        self._costs = None if costs is None else _Costs(*costs)

    def run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the result of a block's forward; recomputes the block in backward if it is not kept."""
        recomputed = self.blocks - self.kept
        if not torch.is_grad_enabled() or index >= self.blocks:
            return forward(*args, **kwargs)
        # In a cache, a recomputed block would find its own keys. XLM fills one in any case.
        for name in CACHES if index < recomputed else ():
            if _holds_tokens(kwargs.get(name)):  # of an earlier call, or of a trained prefix
                return forward(*args, **kwargs)
            if kwargs.get(name) is not None:
                kwargs[name] = None
        if index < recomputed - self.attention_kept:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if index < recomputed:
            stash = OutputStash()

            def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
                return stash.filling(), stash.using()

            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        if self._saved_bytes is None or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        stash = OutputStash()
        with torch.autograd.graph.saved_tensors_hooks(self._count_saved, lambda tensor: tensor), stash.filling():
            result = forward(*args, **kwargs)
        # A recomputed block stores its input too, so that is not a cost of keeping it.
        for storage in _bytes_of(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)):
            self._saved_bytes.pop(storage, None)
        self._attention_bytes = sum(_bytes_of(stash.outputs).values())
        return result

    def _count_saved(self, tensor: Tensor) -> Tensor:
        assert self._saved_bytes is not None
        self._saved_bytes |= _bytes_of((tensor,))
        return tensor

    @contextmanager
    def batch(self, tokens: int, state_bytes: int) -> Iterator[Phase]:
        """Within the block one batch is computed. Yields the context manager for its phases `forward` and `backward`.

        state_bytes: bytes that the optimizer's states take, or will take.
        Raises ConfigError if the budget is too small even if every block is recomputed.
        """
        if isinstance(self.checkpointing, str):
            yield lambda name: nullcontext()
        elif self._costs is not None:
            self._fit(self.checkpointing, tokens, state_bytes)
            yield lambda name: nullcontext()
        else:
            with self._measuring(tokens) as phase:
                yield phase
            self._fit(self.checkpointing, tokens, state_bytes)

    @contextmanager
    def _measuring(self, tokens: int) -> Iterator[Phase]:
        """Within the block one model block is kept; its costs and the peaks of the phases are measured."""
        self.kept, self._saved_bytes = 1, {}
        resident = [*self._model.parameters(), *self._model.buffers(), *shares_of(self._model)]
        with StorageTrace() as trace:
            for tensor in resident:
                trace.label(tensor, Category.BASE_WEIGHT)
            yield trace.phase
        own = _bytes_of(resident)
        base = sum(own.values())
        block = sum(size for storage, size in self._saved_bytes.items() if storage not in own)
        self._saved_bytes = None
        forward, backward = (trace.peak(name)[0] - base for name in PHASES)
        self._costs = _Costs(tokens, forward, backward, block, self._attention_bytes)

    def _fit(self, budget: int, tokens: int, state_bytes: int) -> None:
        """Sets how much is kept. Gradients are counted as if they grew with the tokens too."""
        assert self._costs is not None
        scale = (1 + MARGIN) * max(tokens, 1) / self._costs.tokens
        forward, backward, block, attention = (size * scale for size in self._costs[1:])
        # Recomputing a block in backward needs the bytes of a whole block, so the first kept block does not add to it.
        needed = max(forward - block, backward) + state_bytes
        if needed > budget:
            raise ConfigError(
                f"checkpointing={budget} bytes cannot be met: recomputing every block needs "
                f"{round(needed)} for a batch of {tokens} tokens; give more, or smaller batches"
            )
        room = max(0.0, budget - max(forward, backward) + block - state_bytes)
        rest = max(1.0, block - attention)  # the cost of keeping a block whose attention outputs are kept anyway
        self.kept = max(0, min(self.blocks, int((room - attention * self.blocks) / rest)))
        left = self.blocks - self.kept
        self.attention_kept = min(left, int((room - self.kept * block) / attention)) if attention else 0


def is_recomputed_forward(forward: object) -> bool:
    """Whether a block has this forward from a `BlockCheckpointing`."""
    return isinstance(forward, functools.partial) and isinstance(
        getattr(forward.func, "__self__", None), BlockCheckpointing
    )


def checkpointable_blocks(model: nn.Module, checkpointing: str | int) -> list[nn.Module]:
    """Returns the repeated blocks of a model. Raises ConfigError if some are to be recomputed and there are none."""
    blocks = repeated_blocks(model)
    if checkpointing != NONE and not blocks:
        raise ConfigError(
            f"checkpointing={checkpointing!r} needs blocks in an nn.ModuleList; this model has none: use 'none'"
        )
    return blocks


def _with_gradient(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


@contextmanager
def checkpointed(model: nn.Module, checkpointing: str | int) -> Iterator[BlockCheckpointing]:
    """Within the block, the repeated blocks of the model are recomputed in backward (see `TrainConfig`).

    Checkpointing is non-reentrant, so that inputs need no gradient (behind a frozen embedding). Forward methods are
    restored at the end.
    A model of reversible layers (Reformer) recomputes them itself, whatever `checkpointing` says. For that, the input
    of its layers must require a gradient.
    Raises ConfigError if the model has no ModuleList of blocks, or for a number of bytes and reversible layers.
    """
    if architecture.is_reversible(model):
        if not isinstance(checkpointing, str):
            raise ConfigError(f"a {type(model).__name__} recomputes all of its layers; set checkpointing to 'full'")
        embedding = architecture.input_embedding(model)
        assert embedding is not None
        with embedding.register_forward_hook(_with_gradient):
            yield BlockCheckpointing(model, 0, checkpointing)
        return
    blocks = [] if checkpointing == NONE else checkpointable_blocks(model, checkpointing)
    decider = BlockCheckpointing(model, len(blocks), checkpointing)
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(patched_forward(block, functools.partial(decider.run, index, block.forward)))
        yield decider
