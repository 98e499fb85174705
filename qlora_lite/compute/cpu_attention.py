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

Processors with matrix units make torch's small tiles fast, so torch's kernel can be chosen for forward and for backward
(choices.py). Its backward needs the log-sum-exp of each row of scores, which either forward then keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lite.choices import ATTENTION_BACKWARD, ATTENTION_FORWARD, LARGE_PRODUCTS, TORCH, attention_class, chosen
from qlora_lite.compute.products.frozen_weight import cast, product_dtype
from qlora_lite.compute.recompute import stash_output, stashed_output
from qlora_lite.compute.slicing import fill_skipped_, joined, row_slices, rows_in, rows_that_fit, slices_within

# Query tokens of a block, and the bytes of fp32 scores that are held at once.
BLOCK_ROWS = 128
SCORE_BYTES = 5 << 20
# Bytes of fp32 keys in the rows of a batch that are computed together: few large products, and small copies.
KEY_BYTES = 4 << 20
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # of the queries that torch's kernels are chosen for
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


def _by_key_head(tensor: Tensor, key_heads: int) -> Sequence[Tensor]:
    """Returns the blocks of `(batch, query heads, tokens, d)` as views `(batch, key heads, group, block, d)`."""
    batch, heads, tokens, width = tensor.shape
    sizes = [block.stop - block.start for block in _blocks(tokens)]
    return tensor.view(batch, key_heads, heads // key_heads, tokens, width).split_with_sizes(sizes, 3)


def _rows(block: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a copy of the tokens of a block, `(batch * key heads, group * block, d)`."""
    return _copied(block, dtype).view(block.shape[0] * block.shape[1], -1, block.shape[4])


def _heads(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a copy of keys or values, `(batch * key heads, tokens, d)`."""
    return _copied(tensor, dtype).view(-1, *tensor.shape[2:])


def _whole(matrices: Tensor) -> Tensor:
    """Returns matrices as a batched product reads them: in 16 bits torch copies strided ones itself, in more calls."""
    is_read = matrices.dtype == torch.float32 or matrices.is_contiguous()
    return matrices if is_read else _copied(matrices, matrices.dtype)


def empty_by_token(like: Tensor, width: int | None = None) -> Tensor:
    """Returns an empty tensor `(batch, heads, tokens, d)` laid out as `(batch, tokens, heads, d)`.

    The linear layers before and after attention read and write this layout. width: d, if it is another than like's.
    """
    batch, heads, tokens, own = like.shape
    shape = batch, tokens, heads, own if width is None else width
    return torch.empty(shape, dtype=like.dtype, device=like.device).transpose(1, 2)


class _BlockMask:
    """M for the tokens of a block: 0 where a token may see a key, minus infinity elsewhere, added to its scores.

    On a CPU adding is ten times as fast as `masked_fill_`. later: M of a block among its own tokens.
    """

    def __init__(self, later: Tensor, block: slice, mask: Tensor | None, key_heads: int) -> None:
        self._size = block.stop - block.start
        self._later = later if self._size == len(later) else later[: self._size, : self._size]
        self._mask, self._key_heads = None, key_heads
        if mask is not None:
            shown = mask[:, 0, block, : block.stop]
            self._mask = torch.zeros(shown.shape, device=mask.device).masked_fill_(shown.logical_not(), -torch.inf)

    def add_to_(self, scores: Tensor, piece: slice) -> None:
        """Adds M to scores `(key heads of the piece, group * block, keys)` in place."""
        by_token = scores.view(len(scores), -1, self._size, scores.shape[2])
        by_token[..., -self._size :].add_(self._later)
        if self._mask is not None:
            rows_of_batch = (
                torch.arange(piece.start, piece.start + len(scores), device=scores.device) // self._key_heads
            )
            by_token.add_(self._mask[rows_of_batch].unsqueeze(1))


def _later_tokens(tokens: int, device: torch.device) -> Tensor:
    """Returns M of a block of causal attention among its own tokens."""
    size = min(BLOCK_ROWS, tokens)
    return torch.full((size, size), -torch.inf, device=device).triu_(1)


def _scores(rows: Tensor, keys: Tensor, piece: slice, mask: _BlockMask) -> Tensor:
    """Returns rows keys + M in fp32, `(key heads, group * block, tokens)`; keys `(key heads, d, tokens)`."""
    scores = torch.bmm(rows, keys)
    mask.add_to_(scores, piece)
    return scores


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    log_sums: Tensor | None = None,
) -> Tensor:
    """Returns Y. log_sums `(batch, heads, tokens)`, if given, gets the log-sum-exp of each row of scores."""
    heads, tokens = key.shape[1:3]
    out = empty_by_token(query, value.shape[-1])
    later = _later_tokens(tokens, query.device)
    for part in _batch_parts(key):
        queries, targets = (_by_key_head(rows_in(tensor, part), heads) for tensor in (query, out))
        keys = _heads(rows_in(key, part), torch.float32).mul_(scale).transpose(1, 2)
        values, part_mask = _heads(rows_in(value, part), dtype), None if mask is None else rows_in(mask, part)
        for block, block_query, target in zip(_blocks(tokens), queries, targets, strict=True):
            rows, block_mask = _rows(block_query, torch.float32), _BlockMask(later, block, part_mask, heads)
            seen_keys, seen_values = keys[:, :, : block.stop], values[:, : block.stop]
            results: list[Tensor] = []
            sums: list[Tensor] = []
            for piece in _pieces(rows, block.stop):
                fill_skipped_(results, piece)
                fill_skipped_(sums, piece)
                scores = _scores(rows_in(rows, piece), rows_in(seen_keys, piece), piece, block_mask)
                weights = scores.softmax(-1)
                if log_sums is not None:  # the largest weight is exp(largest score - log-sum-exp)
                    sums.append(scores.amax(-1).sub_(weights.amax(-1).log_()))
                del scores
                weights = _copied(weights, dtype)
                results.append(torch.bmm(weights, _whole(rows_in(seen_values, piece))))
                del weights
            target.copy_(joined(results).view(target.shape))
            if log_sums is not None:
                own = log_sums[part, :, block]
                own.copy_(joined(sums).view(own.shape))
    return out


def attend_back(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of Q, K and V, the last two summed in fp32.

    P = softmax(scale * Q K^T + M), G = gradient of Y:

        dV = P^T G
        dS = P * (G V^T - rowsum(P * G V^T))
        dQ = scale * dS K,  dK = scale * dS^T Q
    """
    heads, tokens = key.shape[1:3]
    found = grad_query, grad_key, grad_value = empty_by_token(query), empty_by_token(key), empty_by_token(value)
    later, factor = _later_tokens(tokens, query.device), torch.full((), scale, device=query.device)
    for part in _batch_parts(key):
        blocks = (_by_key_head(rows_in(tensor, part), heads) for tensor in (query, grad, grad_query))
        low_keys, values = (_heads(rows_in(tensor, part), dtype) for tensor in (key, value))
        keys = _heads(rows_in(key, part), torch.float32).mul_(factor).transpose(1, 2)
        part_mask = None if mask is None else rows_in(mask, part)
        sums = [torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in (low_keys, values)]
        # The last block sees all tokens, so its part of the sums is not added to anything.
        for block, block_query, block_grad, target in reversed(list(zip(_blocks(tokens), *blocks, strict=True))):
            block_mask = _BlockMask(later, block, part_mask, heads)
            is_last = block.stop == tokens
            seen = [low_keys, values, *sums] if is_last else [t[:, : block.stop] for t in (low_keys, values, *sums)]
            rows, grads = _rows(block_query, dtype), _rows(block_grad, dtype)
            slope = _block_back(rows, grads, keys[:, :, : block.stop], seen, block_mask, is_last, scale)
            target.copy_(slope.view(target.shape))
        for whole, total in zip((grad_key, grad_value), (sums[0].mul_(factor), sums[1]), strict=True):
            target = rows_in(whole, part)
            target.copy_(total.view(target.shape))
    return found


def _block_back(
    rows: Tensor, grads: Tensor, keys: Tensor, seen: Sequence[Tensor], mask: _BlockMask, is_last: bool, scale: float
) -> Tensor:
    """Returns dQ of a block of tokens. Adds dS^T Q and dV to the last two of `seen`: K, V, and the two sums.

    is_last: whether the sums are empty yet.
    """
    wide = _copied(rows, torch.float32)
    results: list[Tensor] = []
    for piece in _pieces(rows, keys.shape[2]):
        fill_skipped_(results, piece)
        own_rows, own_grads = rows_in(rows, piece), rows_in(grads, piece)
        low_keys, values, sum_key, sum_value = (rows_in(tensor, piece) for tensor in seen)
        weights = _copied(_scores(rows_in(wide, piece), rows_in(keys, piece), piece, mask).softmax(-1), rows.dtype)
        add = Tensor.copy_ if is_last else _add_
        add(sum_value, torch.bmm(weights.transpose(1, 2), own_grads))
        slope = torch.bmm(own_grads, _whole(values).transpose(1, 2))
        # dS, the derivative of a softmax, in one pass.
        slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, rows.dtype)
        del weights
        out = torch.empty(own_rows.shape, dtype=rows.dtype, device=rows.device)
        results.append(out.baddbmm_(slope, _whole(low_keys), beta=0, alpha=scale))
        add(sum_key, torch.bmm(slope.transpose(1, 2), own_rows))
    return joined(results)


def _add_(total: Tensor, part: Tensor) -> None:
    total.add_(cast(part, total.dtype))  # of two dtypes, torch casts one in more calls


def _torch_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns the mask as torch's kernels add it to the scores; that of later tokens is left to them."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask.logical_not(), -torch.inf)


def _torch_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    """Returns Y and the log-sum-exp of each row of scores by torch's kernel."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, sums = attend(query, key, value, 0.0, True, attn_mask=_torch_mask(mask, query.dtype), scale=scale)
    return out, sums


def _torch_attend_back(grad: Tensor, tensors: tuple[Tensor, ...], mask: Tensor | None, scale: float) -> Any:
    """Returns the gradients of Q, K and V by torch's kernel. tensors: Q, K, V, Y and the log-sum-exp."""
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return back(grad, *tensors, 0.0, True, attn_mask=_torch_mask(mask, tensors[0].dtype), scale=scale)


class _Kernels(NamedTuple):
    """The alternatives of a call, and what products by ours are computed in."""

    forward: str
    backward: str
    dtype: torch.dtype


def _kernels(query: Tensor, value: Tensor) -> _Kernels:
    """Returns the chosen kernels; ours where torch's do not take the shapes."""
    dtype = product_dtype(query, None)
    name = DTYPE_NAMES.get(query.dtype)
    if name is None or query.shape[-1] != value.shape[-1]:
        return _Kernels(LARGE_PRODUCTS, LARGE_PRODUCTS, dtype)
    shapes = attention_class(name, query.shape[2])
    return _Kernels(chosen(f"{ATTENTION_FORWARD}.{shapes}"), chosen(f"{ATTENTION_BACKWARD}.{shapes}"), dtype)


class _CausalAttention(torch.autograd.Function):
    """Attention as one node. Kept for backward: Q, K, V and the mask; for torch's backward Y and the log-sum-exp too.

    results: a list of Y, and the log-sum-exp if backward needs it. It is filled unless it is known already, and is a
    list so that autograd does not take its tensors for inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        kernels: _Kernels,
        results: list[Tensor],
    ) -> Tensor:
        needs_sums = kernels.backward == TORCH
        if results:
            results[0] = results[0].detach()
        elif kernels.forward == TORCH:
            results += _torch_attend(query, key, value, mask, scale)[: 1 + needs_sums]
        else:
            batch, heads, tokens = query.shape[:3]
            empty = (query.new_empty((batch, tokens, heads), dtype=torch.float32) for _ in range(needs_sums))
            sums = [tensor.transpose(1, 2) for tensor in empty]
            results += attend(query, key, value, mask, scale, kernels.dtype, *sums), *sums
        ctx.save_for_backward(query, key, value, mask, *(results if needs_sums else ()))
        ctx.scale, ctx.kernels = scale, kernels
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, *results = ctx.saved_tensors
        if ctx.kernels.backward == TORCH:
            found = _torch_attend_back(grad, (query, key, value, *results), mask, ctx.scale)
        else:
            found = attend_back(grad, query, key, value, mask, ctx.scale, ctx.kernels.dtype)
        return (*found, None, None, None, None)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Returns softmax(scale * Q K^T + M) V, where a token sees itself and earlier tokens that `mask` allows.

    query: `(batch, heads, tokens, d)`; heads is a multiple of key heads.
    key, value: `(batch, key heads, tokens, d)`.
    mask: `(batch, 1, tokens, tokens)`, True where a row may see a column. A row may not be without any.

    Returns `(batch, heads, tokens, d)`, laid out as `(batch, tokens, heads, d)`. Not twice differentiable.
    choices.py says which kernels compute it.
    """
    kernels = _kernels(query, value)
    stashed = (stashed_output() for _ in range(1 + (kernels.backward == TORCH)))
    results = [tensor for tensor in stashed if tensor is not None]
    out: Tensor = _CausalAttention.apply(query, key, value, mask, scale, kernels, results)
    for tensor in results:
        stash_output(tensor)
    return out
