"""Causal attention on a CPU from large matrix products, faster than torch's own kernel there.

torch's CPU kernel of `scaled_dot_product_attention` multiplies small tiles, at a fraction of the speed of batched
products. Here a block of query rows meets all the keys that it may see at once: a product for the scores and a softmax
in fp32, a product with the values. Query heads that share a key head (grouped-query attention) are rows of the same
product, so keys and values are not repeated. Kept for backward are q, k, v and the output; the scores are computed
again there (FlashAttention: arXiv:2205.14135, section 3.1). Where a whole block is computed again in backward, an
`OutputStash` hands it the outputs of the first time: of all that a block computes, they save the most time a byte.

Scores are the one product in fp32: rounded to bf16, those of 16 and more would be off by 6 % after the exponential.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lite.low_rank import product_dtype

# Rows of queries that meet their keys at once, and the bytes of fp32 scores that are held at once.
BLOCK_ROWS = 128
SCORE_BYTES = 4 << 20


class OutputStash:
    """The outputs of the attention calls of a block, in their order: kept `filling()`, handed out again `using()`."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    @contextmanager
    def filling(self) -> Iterator[None]:
        with _active((self.outputs, True)):
            yield

    @contextmanager
    def using(self) -> Iterator[None]:
        outputs, self.outputs = self.outputs, []
        with _active((outputs, False)):
            yield


_stash: ContextVar[tuple[list[Tensor], bool] | None] = ContextVar("stash of attention outputs", default=None)


@contextmanager
def _active(stash: tuple[list[Tensor], bool]) -> Iterator[None]:
    token = _stash.set(stash)
    try:
        yield
    finally:
        _stash.reset(token)


def _pieces(heads: int, group: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """(which key heads, which query tokens) of one product at a time, within a row of the batch."""
    for start in range(0, tokens, BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, tokens))
        count = max(1, SCORE_BYTES // (4 * group * BLOCK_ROWS * block.stop))
        for first in range(0, heads, count):
            yield slice(first, first + count), block


def _by_key_head(tensor: Tensor, heads: int) -> Tensor:
    """`(query heads, tokens, d)` -> `(key heads, group, tokens, d)`, a view."""
    view: Tensor = tensor.unflatten(0, (heads, -1))
    return view


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense copy in this dtype: products of what is laid out in steps are slow."""
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def _weights(rows: Tensor, keys: Tensor, block: slice, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(scale * rows keys^T) over the keys that each row may see, in fp32.

    rows `(heads, group, block, d)`, keys `(heads, seen, d)` in fp32 -> `(heads, group * block, seen)`.
    """
    flat = _copied(rows, torch.float32).flatten(1, 2)
    scores = torch.bmm(flat.mul_(scale), keys.transpose(1, 2))
    by_token, size = scores.view(*rows.shape[:3], -1), rows.shape[2]
    # Added, not filled in: on a CPU that is ten times as fast.
    by_token[..., block] += torch.full((size, size), -torch.inf, device=rows.device).triu_(1)
    if mask is not None:
        by_token.masked_fill_(mask[:, block, : block.stop].logical_not(), -torch.inf)
    weights: Tensor = scores.softmax(-1)
    return weights


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    batch, query_heads, tokens, _ = query.shape
    heads = key.shape[1]
    # The heads of a token lie side by side, as the next layer wants them.
    out = query.new_empty((batch, tokens, query_heads, value.shape[-1])).transpose(1, 2)
    for row in range(batch):
        queries, target = _by_key_head(query[row], heads), _by_key_head(out[row], heads)
        keys, values = _copied(key[row], torch.float32), _copied(value[row], dtype)
        seen = None if mask is None else mask[row]
        for some, block in _pieces(heads, query_heads // heads, tokens):
            rows = queries[some, :, block]
            weights = _weights(rows, keys[some, : block.stop], block, scale, seen).to(dtype)
            target[some, :, block] = torch.bmm(weights, values[some, : block.stop]).view(*rows.shape[:3], -1)
    return out


def _attend_back(
    grad: Tensor, saved: tuple[Tensor, ...], mask: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v of one row of the batch; saved: its q, k, v and output."""
    query, key, value, out = saved
    heads, tokens = key.shape[0], key.shape[1]
    # As the output: the heads of a token side by side.
    grad_query = query.new_empty((tokens, *query.shape[::2])).transpose(0, 1)
    grad_key, grad_value = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))
    queries, outs, grads, target = (_by_key_head(t, heads) for t in (query, out, grad, grad_query))
    keys, low_keys, values = _copied(key, torch.float32), _copied(key, dtype), _copied(value, dtype)
    for some, block in _pieces(heads, query.shape[0] // heads, tokens):
        here, seen = (some, slice(None), block), (some, slice(0, block.stop))
        weights = _weights(queries[here], keys[seen], block, scale, mask)
        grad_rows = _copied(grads[here], dtype)
        # The derivative of a softmax: p (g - sum of p g), and that sum is the output times its gradient.
        offset = (grad_rows.float() * outs[here]).sum(-1).view(weights.shape[0], -1, 1)
        grad_rows = grad_rows.flatten(1, 2)
        grad_value[seen] += torch.bmm(weights.to(dtype).transpose(1, 2), grad_rows)
        slope = torch.bmm(grad_rows, values[seen].transpose(1, 2)).float()
        slope = slope.sub_(offset).mul_(weights.mul_(scale)).to(dtype)
        target[here] = torch.bmm(slope, low_keys[seen]).view(queries[here].shape)
        grad_key[seen] += torch.bmm(slope.transpose(1, 2), _copied(queries[here], dtype).flatten(1, 2))
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        known: list[Tensor],
    ) -> Tensor:
        out = known[0].detach() if known else _attend(query, key, value, mask, scale, dtype)
        ctx.save_for_backward(query, key, value, mask, out)
        ctx.scale, ctx.dtype = scale, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out = ctx.saved_tensors
        results = [
            _attend_back(grad[row], saved, None if mask is None else mask[row], ctx.scale, ctx.dtype)
            for row, saved in enumerate(zip(query, key, value, out, strict=True))
        ]
        # Back in the order of the inputs, whose heads lie side by side as well.
        grads = (torch.stack([t.transpose(0, 1) for t in each]).transpose(1, 2) for each in zip(*results, strict=True))
        return (*grads, None, None, None, None)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale * q k^T) v, where a token sees itself and those before it, and no more than `mask` lets it see.

    query `(batch, heads, tokens, d)`, key and value `(batch, key heads, tokens, d)`, heads a multiple of key heads;
    mask `(batch, 1, tokens, tokens)`, True where a row may look at a column; a row that may look at nothing is NaN.
    -> `(batch, heads, tokens, d)`, laid out as `(batch, tokens, heads, d)`.
    """
    dtype, (outputs, fill) = product_dtype(query, None), _stash.get() or ([], False)
    known = [] if fill or not outputs else [outputs.pop(0)]
    out: Tensor = _CausalAttention.apply(query, key, value, mask, scale, dtype, known)
    if fill:
        outputs.append(out.detach())
    return out
