"""Causal attention on a CPU from large matrix products, in about half the time of torch's own kernel there.

torch's CPU kernel of `scaled_dot_product_attention` multiplies small tiles, at a quarter of the speed of batched bf16
products. Here a block of query rows meets all the keys that it may see at once: a product for the scores, a softmax
in fp32, a product with the values. Query heads that share a key head (grouped-query attention) are rows of the same
product, so keys and values are not repeated. Kept for backward are q, k, v and the output; the scores are computed
again there (FlashAttention: arXiv:2205.14135, section 3.1). Where a whole block is computed again in backward, an
`OutputStash` hands it the outputs of the first time: of all that a block computes, they save the most time a byte.

bf16 costs the scores nothing: a product rounds its sums when it stores them, so a second one computes what the first
one lost (q k^T minus the stored q k^T, subtracted before the rounding), and both parts are added in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

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


class _Piece(NamedTuple):
    """A row of the batch, some of its key heads, and a block of its query tokens."""

    row: int
    heads: slice
    tokens: slice


def _pieces(batch: int, heads: int, group: int, tokens: int) -> Iterator[_Piece]:
    for row in range(batch):
        for start in range(0, tokens, BLOCK_ROWS):
            block = slice(start, min(start + BLOCK_ROWS, tokens))
            count = max(1, SCORE_BYTES // (4 * group * BLOCK_ROWS * block.stop))
            for first in range(0, heads, count):
                yield _Piece(row, slice(first, first + count), block)


def _by_key_head(tensor: Tensor, heads: int) -> Tensor:
    """`(batch, query heads, tokens, d)` -> `(batch, key heads, group, tokens, d)`, a view."""
    view: Tensor = tensor.unflatten(1, (heads, -1))
    return view


def _weights(rows: Tensor, keys: Tensor, piece: _Piece, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(scale * rows keys^T) over the keys that each row may see, in fp32.

    rows `(heads, group, block, d)`, keys `(heads, seen, d)` -> `(heads, group * block, seen)`.
    """
    flat, turned = rows.flatten(1, 2), keys.transpose(1, 2)
    stored = torch.bmm(flat, turned)
    scores = stored.float()
    if stored.dtype != torch.float32:
        scores += torch.baddbmm(stored, flat, turned, beta=-1)
    scores *= scale
    block = rows.shape[2]
    by_token = scores.view(*rows.shape[:3], -1)
    later = torch.ones((block, block), dtype=torch.bool, device=rows.device).triu_(1)
    by_token[..., piece.tokens].masked_fill_(later, -torch.inf)
    if mask is not None:
        by_token.masked_fill_(mask[piece.row, :, piece.tokens, : piece.tokens.stop].logical_not(), -torch.inf)
    weights: Tensor = scores.softmax(-1)
    return weights


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    batch, query_heads, tokens, _ = query.shape
    heads = key.shape[1]
    # The heads of a token lie side by side, as the next layer wants them.
    out = query.new_empty((batch, tokens, query_heads, value.shape[-1])).transpose(1, 2)
    queries, target = _by_key_head(query, heads), _by_key_head(out, heads)
    for piece in _pieces(batch, heads, query_heads // heads, tokens):
        row, some, block = piece
        rows = queries[row, some, :, block].to(dtype)
        weights = _weights(rows, key[row, some, : block.stop].to(dtype), piece, scale, mask).to(dtype)
        mixed = torch.bmm(weights, value[row, some, : block.stop].to(dtype))
        target[row, some, :, block] = mixed.view(*rows.shape[:3], -1)
    return out


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
        batch, query_heads, tokens, width = query.shape
        heads, dtype = key.shape[1], ctx.dtype
        # As the output: the heads of a token side by side.
        grad_query = query.new_empty((batch, tokens, query_heads, width)).transpose(1, 2)
        grad_key, grad_value = (torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
        queries, outs, grads, targets = (_by_key_head(t, heads) for t in (query, out, grad, grad_query))
        for piece in _pieces(batch, heads, query_heads // heads, tokens):
            row, some, block = piece
            here, seen = (row, some, slice(None), block), (row, some, slice(0, block.stop))
            rows, keys = queries[here].to(dtype), key[seen].to(dtype)
            weights = _weights(rows, keys, piece, ctx.scale, mask)
            grad_rows = grads[here].to(dtype)
            # The derivative of a softmax: p (g - sum of p g), and that sum is the output times its gradient.
            offset = (grad_rows.float() * outs[here]).sum(-1).view(weights.shape[0], -1, 1)
            grad_rows = grad_rows.flatten(1, 2)
            grad_value[seen] += torch.bmm(weights.to(dtype).transpose(1, 2), grad_rows)
            slope = torch.bmm(grad_rows, value[seen].to(dtype).transpose(1, 2)).float()
            slope = slope.sub_(offset).mul_(weights).mul_(ctx.scale).to(dtype)
            targets[here] = torch.bmm(slope, keys).view(rows.shape)
            grad_key[seen] += torch.bmm(slope.transpose(1, 2), rows.flatten(1, 2))
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None


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
