"""Runs a model block by block: the calls of its blocks are recorded once, and each block is then run by itself.

    h_0 = embedding(tokens),   h_{i+1} = block_i(h_i, positions, mask, ...),   output = head(norm(h_n))

The model's own forward is run with stand-ins for its blocks, which note their arguments and hand the hidden state on.
So masks and positions are those that the model makes, the blocks may be empty, and in the end the model's own code
computes the output from the last hidden state. This is right only if nothing but the hidden state depends on a block;
two kinds of stand-ins, which return different values, show whether that is so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qlora_lite import architecture
from qlora_lite.errors import ConfigError
from qlora_lite.patches import patched_forward
from qlora_lite.surgery import repeated_blocks

HIDDEN = "hidden_states"
Batch = Mapping[str, Tensor]
# What stands in for a block: hidden state -> hidden state.
StandIn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BlockCall:
    """The arguments with which the model calls a block for one batch, less the hidden state, which is the first."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Returns the hidden state behind the block."""
        output = block(hidden, *self.positional, **self.named)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Recorded:
    """The calls of one batch, a call for each block in order, and the hidden state before the first block."""

    calls: list[BlockCall]
    hidden: Tensor


class BlockChain:
    """The blocks that a model passes its hidden state through, in order.

    Everything of the model but its blocks has values. Raises ConfigError, by `of`, for a model whose blocks do not pass
    one hidden state from each to the next, or take other values that depend on earlier blocks.
    """

    def __init__(self, model: Any, blocks: Sequence[nn.Module], in_tuple: bool) -> None:
        self.model, self.blocks, self._in_tuple = model, list(blocks), in_tuple

    @classmethod
    def of(cls, model: Any, batch: Batch) -> BlockChain:
        """Finds the blocks of a model by a batch."""
        problem = "it has no repeated blocks"
        for in_tuple in (False, True):
            chain = cls(model, repeated_blocks(model), in_tuple)
            try:
                called, one = chain._record(batch, lambda hidden: hidden.clone())
                if not called:
                    break
                _, other = chain._record(batch, lambda hidden: hidden * 2 + 1)
            except (TypeError, ValueError, IndexError, AttributeError, RuntimeError, _Broken) as error:
                problem = "its blocks do not pass one hidden state, and nothing else, from each to the next"
                if not isinstance(error, _Broken):  # of the model's code, to which a stand-in returned too little
                    problem += f" ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
                continue
            if _equal(one.calls, other.calls):
                return cls(model, called, in_tuple)
            problem = "its blocks take other values that depend on earlier blocks"
            break
        raise ConfigError(f"a {type(model).__name__} cannot be calibrated block by block: {problem}")

    @torch.no_grad()
    def _run(self, batch: Batch, forwards: Mapping[nn.Module, Callable[..., object]]) -> Tensor:
        """Returns the input of the output head, with other forwards for these blocks."""
        with ExitStack() as stack:
            for block, forward in forwards.items():
                stack.enter_context(patched_forward(block, forward))
            return architecture.hidden_states(self.model, dict(batch))

    def _returned(self, hidden: Tensor) -> object:
        return (hidden,) if self._in_tuple else hidden

    def _record(self, batch: Batch, stand_in: StandIn) -> tuple[list[nn.Module], Recorded]:
        called: list[nn.Module] = []
        calls: list[BlockCall] = []
        between: list[Tensor] = []  # the first input, then what the stand-ins returned

        def recording(block: nn.Module) -> Callable[..., object]:
            def forward(*args: Any, **kwargs: Any) -> object:
                named = dict(kwargs)
                hidden = args[0] if args else named.pop(HIDDEN, None)
                if not isinstance(hidden, Tensor) or (between and hidden is not between[-1]):
                    raise _Broken
                if not between:
                    between.append(hidden)
                called.append(block)
                calls.append(BlockCall(tuple(args[1:]), named))
                between.append(stand_in(hidden))
                return self._returned(between[-1])

            return forward

        self._run(batch, {block: recording(block) for block in self.blocks})
        if len(set(called)) < len(called):
            raise _Broken  # a block that is called twice
        return called, Recorded(calls, between[0]) if between else Recorded([], torch.empty(0))

    def record(self, batch: Batch) -> Recorded:
        """Returns the calls of a batch. Raises ConfigError if it goes through other blocks than the first batch."""
        called, recorded = self._record(batch, lambda hidden: hidden)
        if called != self.blocks:
            raise ConfigError(f"a {type(self.model).__name__} calls other blocks for one batch than for another")
        return recorded

    def head_inputs(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Returns the input of the output head for the hidden state behind the last block."""

        def passing(value: Tensor | None) -> Callable[..., object]:
            def forward(*args: Any, **kwargs: Any) -> object:
                came = args[0] if args else kwargs[HIDDEN]
                return self._returned(came if value is None else value)

            return forward

        forwards = {block: passing(None) for block in self.blocks[:-1]}
        return self._run(batch, {**forwards, self.blocks[-1]: passing(hidden)})


class _Broken(Exception):
    """The hidden state that one block returns is not what the next one gets."""


def _equal(one: Sequence[BlockCall], other: Sequence[BlockCall]) -> bool:
    """Whether all tensors in the arguments of these calls are equal."""
    leaves = [
        [leaf for leaf in tree_leaves([(c.positional, dict(c.named)) for c in calls]) if isinstance(leaf, Tensor)]
        for calls in (one, other)
    ]
    same_count = len(leaves[0]) == len(leaves[1])
    return same_count and all(torch.equal(mine, theirs) for mine, theirs in zip(*leaves, strict=True))
