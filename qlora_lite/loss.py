"""Cross-entropy of a linear head without the logits.

The plain way, `F.cross_entropy(hidden @ W.T, labels)`, holds tokens x vocabulary values several times over (logits,
their fp32 copy, their softmax): 12-16 bytes each, 1.8 MB per token at a vocabulary of 128k. Here a few tokens at a
time get their logits, their loss and the gradient of their hidden state, and the logits are dropped. Tokens without
a label are skipped before the product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from qlora_lite.errors import InputError
from qlora_lite.low_rank import Packed, dense, product_dtype

IGNORE_INDEX = -100
# Bounds the fp32 logits of one chunk of tokens, of which two copies live at a time.
CHUNK_BYTES = 32 << 20


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over labelled rows of logsumexp(W h + b) - (W h + b)[label]; the gradient of h is formed in forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | Packed, bias: Tensor | None, labels: Tensor) -> Tensor:
        dtype = product_dtype(hidden, None)
        matrix = dense(weight, dtype)
        offset = None if bias is None else bias.to(dtype)
        rows = max(1, CHUNK_BYTES // (4 * matrix.shape[0]))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part].to(dtype), matrix, offset).float()
            picked = labels[part].unsqueeze(1)
            normalizer = logits.logsumexp(1, keepdim=True)
            loss += (normalizer - logits.gather(1, picked)).sum()
            if gradient is not None:
                softmax = logits.sub_(normalizer).exp_()
                softmax.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=softmax.dtype))
                gradient[part] = softmax.to(dtype) @ matrix
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


def _labelled(labels: Tensor, ignore_index: int) -> Tensor:
    """Positions with a label. Fake labels have no values: there every position counts, the most that can be."""
    if isinstance(labels, FakeTensor):
        return torch.arange(labels.numel(), device=labels.device)
    return (labels != ignore_index).nonzero().squeeze(1)


def _check_labels(labels: Tensor, kept: Tensor, vocabulary: int) -> None:
    if labels.dtype != torch.int64:
        raise InputError(f"labels must be int64; got {labels.dtype}")
    if isinstance(labels, FakeTensor) or not kept.numel():
        return
    low, high = (int(value) for value in labels.index_select(0, kept).aminmax())
    if low < 0 or high >= vocabulary:
        raise InputError(f"labels must be in [0, {vocabulary}) or the ignored index; got {low if low < 0 else high}")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | Packed,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
) -> Tensor:
    """`F.cross_entropy(hidden @ weight.T + bias, labels)` without the logits; weight and bias are frozen.

    hidden `(..., features)`, weight `(vocabulary, features)` dense or packed, labels `(...)` int64 -> fp32 scalar.
    Products in hidden's dtype (see `product_dtype`), log-sum-exp and sum in fp32. reduction: `mean` over labelled
    tokens (NaN without any, as in torch) or `sum`. Gradient: hidden only. InputError for shapes that do not match.
    """
    if hidden.shape[:-1] != labels.shape:
        raise InputError(f"labels should have the shape {tuple(hidden.shape[:-1])}; got {tuple(labels.shape)}")
    if reduction not in ("mean", "sum"):
        raise InputError(f"reduction must be mean or sum; got {reduction!r}")
    flat = labels.reshape(-1)
    kept = _labelled(flat, ignore_index)
    _check_labels(flat, kept, weight.shape[0])
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, kept)
    loss: Tensor = _LinearCrossEntropy.apply(rows, weight, bias, flat.index_select(0, kept))
    return loss if reduction == "sum" else loss / kept.numel()
