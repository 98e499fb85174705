"""Causal attention on a CPU from large matrix products, faster than torch's own kernel there.

    Y = softmax(scale * Q K^T + M) V        M: 0 where a query may see a key, minus infinity elsewhere

torch's CPU kernel of `scaled_dot_product_attention` multiplies small tiles, at a fraction of the speed of batched
products. Here a block of query rows is multiplied with all keys that it may see at once: a product for the scores and
the softmax in fp32, a product with the values in the dtype of the inputs. Query heads that share a key head
(grouped-query attention) are rows of the same product, so keys and values are not repeated. Only Q, K and V are kept
for backward, and the scores are computed again there (FlashAttention, arXiv:2205.14135, section 3.1). A block that is
recomputed as a whole may keep the outputs of its attention calls in an `OutputStash` (recompute.py): of everything
that a block computes, they save the most time per byte.

The scores are the one product in fp32: rounded to bf16, a score of 16 would be off by up to 6 % after the exponential.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lite.compute.lora_linear import product_dtype
from qlora_lite.compute.recompute import stash_output, stashed_output
from qlora_lite.compute.slicing import row_slices, rows_that_fit, slices_within

# Query tokens of a block, and the bytes of fp32 scores that are held at once.
BLOCK_ROWS = 128
SCORE_BYTES = 4 << 20
# Bytes of fp32 keys in the rows of a batch that are computed together: few large products, and small copies.
KEY_BYTES = 4 << 20
# Options of transformers' attention functions that those here do not have.
UNSUPPORTED_OPTIONS = ("softcap", "position_bias", "cache", "s_aux", "output_attentions")


def asks_for_more(options: Mapping[str, Any]) -> bool:
    """Whether a call of transformers' attention has options that the functions here do not have."""
    unsupported = (options.get(name) for name in UNSUPPORTED_OPTIONS)
    return bool(options.get("dropout")) or any(value is not None and value is not False for value in unsupported)


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a contiguous copy in this dtype; products of strided tensors are slow."""
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def _batch_parts(key: Tensor) -> Iterator[slice]:
    """Yields slices of the batch that are computed together."""
    return slices_within(key.shape, torch.float32.itemsize, KEY_BYTES, like=key)


def _blocks(tokens: int) -> Iterator[slice]:
    """Yields slices of query tokens; the tokens of a slice see keys up to its `stop` at most."""
    return row_slices(tokens, BLOCK_ROWS)


def _pieces(rows: Tensor, seen: int) -> Iterator[slice]:
    """Yields slices of the key heads of `rows` `(key heads, rows, d)` whose scores are held at once.

    Their number is a multiple of the number of threads where possible, so that threads get even shares.
    """
    heads, threads = rows.shape[0], torch.get_num_threads()
    count = rows_that_fit(SCORE_BYTES, 4 * rows.shape[1] * seen)
    if threads < count < heads:
        count -= count % threads
    return row_slices(heads, count, rows)


def _by_key_head(tensor: Tensor, key_heads: int) -> Tensor:
    """Returns a view `(batch, key heads, group, tokens, d)` of `(batch, query heads, tokens, d)`."""
    view: Tensor = tensor.unflatten(1, (key_heads, -1))
    return view


def _rows(grouped: Tensor, block: slice, dtype: torch.dtype) -> Tensor:
    """Returns a copy of the tokens of a block, `(batch * key heads, group * block, d)`."""
    return _copied(grouped[:, :, :, block], dtype).flatten(2, 3).flatten(0, 1)


def _empty_by_token(like: Tensor) -> Tensor:
    """Returns an empty tensor `(batch, heads, tokens, d)` laid out as `(batch, tokens, heads, d)`.

    The linear layers before and after attention read and write this layout.
    """
    batch, heads, tokens, width = like.shape
    return like.new_empty((batch, tokens, heads, width)).transpose(1, 2)


class _BlockMask:
    """M for the tokens of a block: 0 where a token may see a key, minus infinity elsewhere, added to its scores.

    On a CPU adding is ten times as fast as `masked_fill_`.
    """

    def __init__(self, block: slice, mask: Tensor | None, key_heads: int, device: torch.device) -> None:
        size = block.stop - block.start
        self._later = torch.full((size, size), -torch.inf, device=device).triu_(1)
        self._mask, self._key_heads = None, key_heads
        if mask is not None:
            shown = mask[:, 0, block, : block.stop]
            self._mask = torch.zeros(shown.shape, device=device).masked_fill_(shown.logical_not(), -torch.inf)

    def add_to_(self, scores: Tensor, piece: slice) -> None:
        """Adds M to scores `(key heads of the piece, group * block, keys)` in place."""
        size = self._later.shape[0]
        by_token = scores.unflatten(1, (-1, size))
        by_token[..., -size:] += self._later
        if self._mask is not None:
            rows_of_batch = (
                torch.arange(piece.start, piece.start + len(scores), device=scores.device) // self._key_heads
            )
            by_token += self._mask[rows_of_batch].unsqueeze(1)


def _weights(rows: Tensor, keys: Tensor, piece: slice, mask: _BlockMask) -> Tensor:
    """Returns softmax(rows keys^T + M) in fp32, `(key heads, group * block, keys)`."""
    scores = torch.bmm(rows[piece], keys[piece].transpose(1, 2))
    mask.add_to_(scores, piece)
    return scores.softmax(-1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    heads, tokens = key.shape[1:3]
    out = _empty_by_token(query[..., :1].expand(*query.shape[:3], value.shape[-1]))
    for part in _batch_parts(key):
        queries, target = _by_key_head(query[part], heads), _by_key_head(out[part], heads)
        keys, values = _copied(key[part], torch.float32).flatten(0, 1), _copied(value[part], dtype).flatten(0, 1)
        for block in _blocks(tokens):
            rows = _rows(queries, block, torch.float32).mul_(scale)
            block_mask = _BlockMask(block, None if mask is None else mask[part], heads, rows.device)
            results = values.new_empty((*rows.shape[:2], values.shape[-1]))
            for piece in _pieces(rows, block.stop):
                weights = _weights(rows, keys[:, : block.stop], piece, block_mask).to(dtype)
                torch.bmm(weights, values[piece, : block.stop], out=results[piece])
            block_out = target[:, :, :, block]
            block_out.copy_(results.view(block_out.shape))
    return out


def _attend_back(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of Q, K and V, the last two summed in fp32.

    P = softmax(scale * Q K^T + M), G = gradient of Y:

        dV = P^T G
        dS = P * (G V^T - rowsum(P * G V^T))
        dQ = scale * dS K,  dK = scale * dS^T Q
    """
    heads, tokens = key.shape[1:3]
    found = grad_query, grad_key, grad_value = _empty_by_token(query), _empty_by_token(key), _empty_by_token(value)
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
            block_mask = _BlockMask(block, None if mask is None else mask[part], heads, rows.device)
            results = torch.empty_like(low_rows)
            for piece in _pieces(rows, block.stop):
                seen = piece, slice(0, block.stop)
                weights = _weights(rows, keys[:, : block.stop], piece, block_mask).to(dtype)
                sum_value[seen] += torch.bmm(weights.transpose(1, 2), grad_rows[piece])
                slope = torch.bmm(grad_rows[piece], values[seen].transpose(1, 2))
                # dS, the derivative of a softmax, in one pass.
                slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, dtype)
                torch.bmm(slope, low_keys[seen], out=results[piece])
                sum_key[seen] += torch.bmm(slope.transpose(1, 2), low_rows[piece])
            block_grad = target[:, :, :, block]
            block_grad.copy_(results.mul_(scale).view(block_grad.shape))
        grad_key[part] = sum_key.mul_(scale).view(key[part].shape)
        grad_value[part] = sum_value.view(value[part].shape)
    return found


class _CausalAttention(torch.autograd.Function):
    """Attention as one node. Kept for backward: Q, K, V and the mask.

    known: a list with the output if it is known, in a list so that autograd does not take it for an input.
    """

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
    """Returns softmax(scale * Q K^T + M) V, where a token sees itself and earlier tokens that `mask` allows.

    query: `(batch, heads, tokens, d)`; heads is a multiple of key heads.
    key, value: `(batch, key heads, tokens, d)`.
    mask: `(batch, 1, tokens, tokens)`, True where a row may see a column. A row that may see nothing gives NaN.

    Returns `(batch, heads, tokens, d)`, laid out as `(batch, tokens, heads, d)`. Not twice differentiable.
    """
    stashed = stashed_output()
    known = [] if stashed is None else [stashed]
    out: Tensor = _CausalAttention.apply(query, key, value, mask, scale, product_dtype(query, None), known)
    stash_output(out)
    return out


def one_query_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Returns the attention `(rows, 1, heads, d)` of one query token `(rows, heads, 1, d)` to all keys.

    Query heads that share a key head become rows of torch's kernel, which otherwise repeats keys and values for each.
    """
    rows, heads, _, width = query.shape
    shared = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    y: Tensor = F.scaled_dot_product_attention(shared, key, value, scale=scale)
    return y.reshape(rows, 1, heads, value.shape[-1])
