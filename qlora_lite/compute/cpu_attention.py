"""Causal attention on a CPU from large matrix products, faster than torch's own kernel there.

torch's CPU kernel of `scaled_dot_product_attention` multiplies small tiles, at a fraction of the speed of batched
products. Here a block of query rows meets all the keys that it may see at once: a product for the scores and a softmax
in fp32, a product with the values. Query heads that share a key head (grouped-query attention) are rows of the same
product, so keys and values are not repeated. Kept for backward are q, k and v; the scores are computed again there
(FlashAttention: arXiv:2205.14135, section 3.1). Where a whole block is computed again in backward, an
`OutputStash` hands it the outputs of the first time: of all that a block computes, they save the most time a byte.

Scores are the one product in fp32: rounded to bf16, those of 16 and more would be off by 6 % after the exponential.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lite.compute.lora_linear import product_dtype
from qlora_lite.compute.recompute import stash_output, stashed_output
from qlora_lite.compute.slicing import row_slices, rows_that_fit, slices_within

# Rows of queries that meet their keys at once, and the bytes of fp32 scores that are held at once.
BLOCK_ROWS = 128
SCORE_BYTES = 4 << 20
# Rows of a batch go together, up to so many bytes of keys in fp32: few large products, and copies that stay small.
KEY_BYTES = 4 << 20


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense copy in this dtype: products of what is laid out in steps are slow."""
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def _batch_parts(key: Tensor) -> Iterator[slice]:
    """Rows of the batch to take together."""
    return slices_within(key.shape, torch.float32.itemsize, KEY_BYTES, like=key)


def _blocks(tokens: int) -> Iterator[slice]:
    """The query tokens of one block of rows at a time; they see the keys up to `stop`."""
    return row_slices(tokens, BLOCK_ROWS)


def _pieces(rows: Tensor, seen: int) -> Iterator[slice]:
    """Which key heads of rows `(key heads, rows, d)` meet their keys at once; an even share for each thread, if any."""
    heads, threads = rows.shape[0], torch.get_num_threads()
    count = rows_that_fit(SCORE_BYTES, 4 * rows.shape[1] * seen)
    if threads < count < heads:
        count -= count % threads
    return row_slices(heads, count, rows)


def _by_key_head(tensor: Tensor, key_heads: int) -> Tensor:
    """`(batch, query heads, tokens, d)` -> `(batch, key heads, group, tokens, d)`, a view."""
    view: Tensor = tensor.unflatten(1, (key_heads, -1))
    return view


def _rows(grouped: Tensor, block: slice, dtype: torch.dtype) -> Tensor:
    """A copy of the tokens of a block, `(batch * key heads, group * block, d)`."""
    return _copied(grouped[:, :, :, block], dtype).flatten(2, 3).flatten(0, 1)


def _beside(like: Tensor) -> Tensor:
    """An empty tensor of this shape `(batch, heads, tokens, d)` with the heads of a token side by side, as the layers
    before and after attention want them."""
    batch, heads, tokens, width = like.shape
    return like.new_empty((batch, tokens, heads, width)).transpose(1, 2)


class _Sight:
    """What the tokens of a block may see, as numbers to add to scores: 0 or minus infinity.

    Added, not filled in: on a CPU that is ten times as fast.
    """

    def __init__(self, block: slice, mask: Tensor | None, key_heads: int, device: torch.device) -> None:
        size = block.stop - block.start
        self._later = torch.full((size, size), -torch.inf, device=device).triu_(1)
        self._mask, self._key_heads = None, key_heads
        if mask is not None:
            shown = mask[:, 0, block, : block.stop]
            self._mask = torch.zeros(shown.shape, device=device).masked_fill_(shown.logical_not(), -torch.inf)

    def limit_(self, scores: Tensor, piece: slice) -> None:
        """scores `(key heads of the piece, group * block, seen)`."""
        size = self._later.shape[0]
        by_token = scores.unflatten(1, (-1, size))
        by_token[..., -size:] += self._later
        if self._mask is not None:
            rows_of_batch = (
                torch.arange(piece.start, piece.start + len(scores), device=scores.device) // self._key_heads
            )
            by_token += self._mask[rows_of_batch].unsqueeze(1)


def _weights(rows: Tensor, keys: Tensor, piece: slice, sight: _Sight) -> Tensor:
    """softmax(rows keys^T) over the keys that each row may see, in fp32: `(key heads, group * block, seen)`."""
    scores = torch.bmm(rows[piece], keys[piece].transpose(1, 2))
    sight.limit_(scores, piece)
    return scores.softmax(-1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    heads, tokens = key.shape[1:3]
    out = _beside(query[..., :1].expand(*query.shape[:3], value.shape[-1]))
    for part in _batch_parts(key):
        queries, target = _by_key_head(query[part], heads), _by_key_head(out[part], heads)
        keys, values = _copied(key[part], torch.float32).flatten(0, 1), _copied(value[part], dtype).flatten(0, 1)
        for block in _blocks(tokens):
            rows = _rows(queries, block, torch.float32).mul_(scale)
            sight = _Sight(block, None if mask is None else mask[part], heads, rows.device)
            results = values.new_empty((*rows.shape[:2], values.shape[-1]))
            for piece in _pieces(rows, block.stop):
                weights = _weights(rows, keys[:, : block.stop], piece, sight).to(dtype)
                torch.bmm(weights, values[piece, : block.stop], out=results[piece])
            here = target[:, :, :, block]
            here.copy_(results.view(here.shape))
    return out


def _attend_back(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    heads, tokens = key.shape[1:3]
    found = grad_query, grad_key, grad_value = _beside(query), _beside(key), _beside(value)
    for part in _batch_parts(key):
        queries, grads, target = (_by_key_head(t[part], heads) for t in (query, grad, grad_query))
        keys, low_keys, values = (
            _copied(tensor[part], kind).flatten(0, 1)
            for tensor, kind in ((key, torch.float32), (key, dtype), (value, dtype))
        )
        sum_key, sum_value = (torch.zeros_like(t, dtype=torch.float32) for t in (keys, values))
        for block in _blocks(tokens):
            low_rows, grad_rows = _rows(queries, block, dtype), _rows(grads, block, dtype)
            rows = low_rows.to(torch.float32, copy=True).mul_(scale)
            sight = _Sight(block, None if mask is None else mask[part], heads, rows.device)
            results = torch.empty_like(low_rows)
            for piece in _pieces(rows, block.stop):
                seen = piece, slice(0, block.stop)
                weights = _weights(rows, keys[:, : block.stop], piece, sight).to(dtype)
                sum_value[seen] += torch.bmm(weights.transpose(1, 2), grad_rows[piece])
                slope = torch.bmm(grad_rows[piece], values[seen].transpose(1, 2))
                # p (g - sum of p g), the derivative of a softmax, in one pass.
                slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, dtype)
                torch.bmm(slope, low_keys[seen], out=results[piece])
                sum_key[seen] += torch.bmm(slope.transpose(1, 2), low_rows[piece])
            here = target[:, :, :, block]
            here.copy_(results.mul_(scale).view(here.shape))
        grad_key[part] = sum_key.mul_(scale).view(key[part].shape)
        grad_value[part] = sum_value.view(value[part].shape)
    return found


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
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale, ctx.dtype = scale, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        return (*_attend_back(grad, query, key, value, mask, ctx.scale, ctx.dtype), None, None, None, None)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale * q k^T) v, where a token sees itself and those before it, and no more than `mask` lets it see.

    query `(batch, heads, tokens, d)`, key and value `(batch, key heads, tokens, d)`, heads a multiple of key heads;
    mask `(batch, 1, tokens, tokens)`, True where a row may look at a column; a row that may look at nothing is NaN.
    -> `(batch, heads, tokens, d)`, laid out as `(batch, tokens, heads, d)`.
    """
    known = stashed_output()
    # In a list, so that autograd does not take the output for an input.
    known_list = [] if known is None else [known]
    out: Tensor = _CausalAttention.apply(query, key, value, mask, scale, product_dtype(query, None), known_list)
    stash_output(out)
    return out
