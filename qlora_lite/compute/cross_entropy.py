"""Cross entropy of a linear head without its logits.

    loss = F.cross_entropy(softcap(scale * (H W^T + b)), labels)       H (tokens, features), W (vocabulary, features)

Computed this way, tokens x vocabulary values are held several times over (logits, their fp32 copy, their softmax): 12
to 16 bytes each, 1.8 MB per token for a vocabulary of 128k. Here the logits of a few tokens at a time are computed,
their loss and all gradients are formed, and the logits are dropped; a packed head is unpacked some rows at a time.
Products are in the dtype of the hidden states, as in the plain way; the softmax is in fp32, a few rows at a time.
Tokens without a label are removed before the product. Memory above inputs and gradients is bounded by `CHUNK_BYTES` of
logits, a few `SOFTMAX_BYTES` and a slice of the head, whatever the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from qlora_lite.compute.products.frozen_weight import Weight, dense_slices, product_dtype
from qlora_lite.compute.slicing import rows_in, slices_within
from qlora_lite.errors import InputError

IGNORE_INDEX = -100
# Bytes of logits of one chunk of tokens. Each chunk reads the head twice, so small chunks are slow.
CHUNK_BYTES = 24 << 20
# Bytes of fp32 values of the softmax at once.
SOFTMAX_BYTES = 2 << 20


@dataclass(frozen=True)
class HeadOptions:
    """Options of a head: z = softcap(scale * (W h + b)) / temperature; smoothing of the labels is the loss's.

    lora_scaling: of the adapter on the head. tokens `(n,)`: the rows of W that other rows replace, or None.
    """

    scale: float = 1.0
    softcap: float | None = None
    smoothing: float = 0.0
    lora_scaling: float = 1.0
    tokens: Tensor | None = None
    temperature: float = 1.0


class HeadTensors(NamedTuple):
    """The tensors of a head: W `(vocabulary, features)`, b, A, B, and the rows that replace those of some tokens."""

    weight: Weight
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    replaced: Tensor | None


class GradientSums(dict[str, Tensor]):
    """Gradients of a head's tensors, summed over chunks, in fp32; only those that are needed have an entry."""

    @classmethod
    def of(cls, head: HeadTensors, needs: Sequence[bool]) -> GradientSums:
        """Returns zeros for the tensors that need a gradient; needs: one for each tensor of the head."""
        return cls(
            {
                name: torch.zeros_like(tensor, dtype=torch.float32)
                for name, tensor, needed in zip(head._fields, head, needs, strict=True)
                if isinstance(tensor, Tensor) and needed
            }
        )

    def add(self, name: str, part: slice, value: Callable[[], Tensor]) -> None:
        if name in self:
            self[name][part] += value()


def _logits(rows: Tensor, weight: Weight, low: Tensor | None, lora_B: Tensor | None, o: HeadOptions) -> Tensor:
    """Returns rows W^T + lora_scaling * low B^T in the dtype of the rows, without bias, scale and softcap."""
    logits: Tensor | None = None
    for part, dense in dense_slices(weight, rows):
        piece = rows @ dense.T
        if low is not None and lora_B is not None:
            piece.addmm_(low, lora_B[part].to(rows.dtype).T, alpha=o.lora_scaling)
        if piece.shape[1] == weight.shape[0]:
            return piece
        if logits is None:
            logits = rows.new_empty((rows.shape[0], weight.shape[0]))
        logits[:, part] = piece
        del piece
    assert logits is not None
    return logits


def logit_chunks(hidden: Tensor, head: HeadTensors, o: HeadOptions) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields the logits of some rows of hidden at a time, without bias, scale and softcap: (slice, rows, logits).

    hidden `(n, features)`; rows and logits are in the dtype of the products. The caller may overwrite the logits, and
    must not hold them when it asks for the next ones.
    """
    dtype = product_dtype(hidden, None)
    for chunk in slices_within((hidden.shape[0], head.weight.shape[0]), dtype.itemsize, CHUNK_BYTES, like=hidden):
        rows = hidden[chunk].to(dtype)
        logits = _logits(rows, head.weight, _low(rows, head), head.lora_B, o)
        if head.replaced is not None:
            logits[:, o.tokens] = rows @ head.replaced.to(dtype).T
        yield chunk, rows, logits
        del logits


def _low(rows: Tensor, head: HeadTensors) -> Tensor | None:
    return None if head.lora_A is None else rows @ head.lora_A.to(rows.dtype).T


def softmax_parts(logits: Tensor) -> Iterator[slice]:
    """Yields slices of the rows of logits whose fp32 values take `SOFTMAX_BYTES`."""
    yield from slices_within(logits.shape, torch.float32.itemsize, SOFTMAX_BYTES, like=logits)


def softmax_input(
    logits: Tensor, bias: Tensor | None, o: HeadOptions, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns z in fp32, and the factor of the softcap in its derivative, 1 - (z / c)^2, if it is needed."""
    z = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).copy_(logits)
    if bias is not None:
        z += bias
    curve = None
    if o.scale != 1:
        z *= o.scale
    if o.softcap is not None:
        z.div_(o.softcap).tanh_()
        curve = 1 - z * z if with_slope else None
        z *= o.softcap
    if o.temperature != 1:
        z /= o.temperature
    return z, curve


def slope_of_products(slope: Tensor, curve: Tensor | None, o: HeadOptions) -> Tensor:
    """Turns a derivative by z into one by the products with W: times scale * (1 - (z / c)^2) / temperature."""
    if curve is not None:
        slope *= curve
    factor = o.scale / o.temperature
    return slope.mul_(factor) if factor != 1 else slope


def _loss_and_slope(
    logits: Tensor, bias: Tensor | None, labels: Tensor, o: HeadOptions, with_slope: bool
) -> tuple[Tensor, Tensor]:
    """Returns the summed loss of some rows, and its derivative by their products with W, in fp32.

    With p = softmax(z), c = softcap, e = smoothing, V = vocabulary, and y the one-hot label:

        loss  = logsumexp(z) - (1 - e) z[label] - e mean(z)
        slope = scale * (1 - (z / c)^2) * (p - (1 - e) y - e / V)      factor of softcap only with a softcap
    """
    z, curve = softmax_input(logits, bias, o, with_slope)
    picked, largest = labels.unsqueeze(1), z.amax(1, keepdim=True)
    loss = torch.sub(largest, z.gather(1, picked), alpha=1 - o.smoothing).sum()
    if o.smoothing:
        loss -= o.smoothing * z.mean(1).sum()
    total = z.sub_(largest).exp_().sum(1, keepdim=True)
    loss += total.log().sum()
    if not with_slope:
        return loss, z
    slope = z.div_(total)
    slope.scatter_(1, picked, -(1 - o.smoothing), reduce="add")
    if o.smoothing:
        slope.sub_(o.smoothing / z.shape[1])
    return loss, slope_of_products(slope, curve, o)


def _chunk_loss(
    logits: Tensor, bias: Tensor | None, labels: Tensor, o: HeadOptions, sums: GradientSums | None
) -> Tensor:
    """Returns the summed loss of a chunk; with `sums`, overwrites the logits by their derivative."""
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    for part in softmax_parts(logits):
        rows = rows_in(logits, part)
        part_loss, slope = _loss_and_slope(rows, bias, rows_in(labels, part), o, sums is not None)
        loss += part_loss
        if sums is not None:
            rows.copy_(slope)
            sums.add("bias", slice(None), functools.partial(slope.sum, 0))
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of logsumexp(z) - z[label]. Forms every gradient in forward, and scales it in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor,
        o: HeadOptions,
        hidden: Tensor,
        *tensors: Any,
    ) -> Tensor:
        head, needs = HeadTensors(*tensors), ctx.needs_input_grad[2:]
        sums = GradientSums.of(head, needs[1:]) if any(needs) else None
        gradient = torch.empty_like(hidden) if needs[0] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for chunk, rows, logits in logit_chunks(hidden, head, o):
            loss += _chunk_loss(logits, head.bias, labels[chunk], o, sums)
            if sums is not None:
                grad_rows = chunk_gradients(rows, head, logits, o, sums)
                if gradient is not None:
                    gradient[chunk] = grad_rows
            del logits
        ctx.save_for_backward(gradient, *(sums.get(name) if sums else None for name in head._fields))
        ctx.dtypes = [t.dtype if isinstance(t, Tensor) else None for t in (hidden, *head)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if total is None else (total * grad.to(total.dtype)).to(dtype)
            for total, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (None, None, *scaled)


def _replaced_gradients(rows: Tensor, replaced: Tensor, slope: Tensor, o: HeadOptions, sums: GradientSums) -> Tensor:
    """Adds a chunk's gradient of the replaced rows of W to the sums. Returns their part of the gradient of hidden rows.

    Sets their columns of `slope` to 0, since the rows of W that they replace have no part in the logits.
    """
    piece = slope[:, o.tokens]
    sums.add("replaced", slice(None), functools.partial(torch.mm, piece.T, rows))
    slope[:, o.tokens] = 0
    return piece @ replaced.to(rows.dtype)


def chunk_gradients(rows: Tensor, head: HeadTensors, slope: Tensor, o: HeadOptions, sums: GradientSums) -> Tensor:
    """Adds a chunk's gradients of the head's tensors to the sums. Returns the gradient of its hidden rows, in fp32.

    slope `(rows, vocabulary)`: the derivative by the products with W, which is overwritten.
    """
    of_replaced = None if head.replaced is None else _replaced_gradients(rows, head.replaced, slope, o, sums)
    low = _low(rows, head)
    grad_rows = torch.zeros_like(rows, dtype=torch.float32)
    grad_low = None if low is None else torch.zeros_like(low, dtype=torch.float32)
    for part, dense in dense_slices(head.weight, rows):
        piece = slope[:, part]
        grad_rows += piece @ dense
        sums.add("weight", part, functools.partial(torch.mm, piece.T, rows))
        if low is not None and head.lora_B is not None and grad_low is not None:
            sums.add("lora_B", part, functools.partial(torch.mm, piece.T, low * o.lora_scaling))
            grad_low += (piece @ head.lora_B[part].to(rows.dtype)).mul_(o.lora_scaling)
    if grad_low is not None and head.lora_A is not None:
        grad_rows += grad_low.to(rows.dtype) @ head.lora_A.to(rows.dtype)
        sums.add("lora_A", slice(None), functools.partial(torch.mm, grad_low.to(rows.dtype).T, rows))
    return grad_rows if of_replaced is None else grad_rows.add_(of_replaced)


def _labelled(labels: Tensor, ignore_index: int) -> Tensor:
    """Returns the positions with a label. Fake labels have no values: all positions count, which is the maximum."""
    if isinstance(labels, FakeTensor):
        return torch.arange(labels.numel(), device=labels.device)
    return (labels != ignore_index).nonzero().squeeze(1)


def _check_labels(labels: Tensor, kept: Tensor, vocabulary: int) -> None:
    """Raises InputError for labels of another dtype than int64, or outside of the vocabulary."""
    if labels.dtype != torch.int64:
        raise InputError(f"labels must be int64; got {labels.dtype}")
    if isinstance(labels, FakeTensor) or not kept.numel():
        return
    low, high = (int(value) for value in labels.index_select(0, kept).aminmax())
    if low < 0 or high >= vocabulary:
        raise InputError(f"labels must be in [0, {vocabulary}) or the ignored index; got {low if low < 0 else high}")


class HeadCall(NamedTuple):
    """The labelled tokens of a call: their places among all, their hidden states and labels; the head, its options."""

    kept: Tensor
    rows: Tensor
    labels: Tensor
    head: HeadTensors
    options: HeadOptions


def head_call(
    hidden: Tensor,
    weight: Weight,
    labels: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, float] | None,
    replaced: tuple[Tensor, Tensor] | None,
    ignore_index: int,
    options: HeadOptions,
) -> HeadCall:
    """Returns the arguments of `linear_cross_entropy` and its like as their nodes take them.

    Raises InputError for shapes, labels or a softcap that do not fit.
    """
    if hidden.shape[:-1] != labels.shape:
        raise InputError(f"labels should have the shape {tuple(hidden.shape[:-1])}; got {tuple(labels.shape)}")
    if options.softcap is not None and not options.softcap > 0:
        raise InputError(f"softcap must be above 0, or None; got {options.softcap}")
    flat = labels.reshape(-1)
    kept = _labelled(flat, ignore_index)
    _check_labels(flat, kept, weight.shape[0])
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, kept)
    (lora_A, lora_B, lora_scaling), (tokens, values) = lora or (None, None, 1.0), replaced or (None, None)
    head = HeadTensors(weight, bias, lora_A, lora_B, values)
    if not torch.is_grad_enabled():  # a Function is told that parameters need gradients all the same
        head = head._replace(**{name: t.detach() for name, t in head._asdict().items() if isinstance(t, Tensor)})
    options = replace(options, lora_scaling=lora_scaling, tokens=tokens)
    return HeadCall(kept, rows, flat.index_select(0, kept), head, options)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Weight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    lora: tuple[Tensor, Tensor, float] | None = None,
    replaced: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Returns `F.cross_entropy(hidden @ weight.T + bias, labels)` as an fp32 scalar, without making the logits.

    hidden: `(..., features)`. labels: `(...)`, int64; tokens with `ignore_index` do not count.
    weight: `(vocabulary, features)`, a tensor or packed.
    lora: (A, B, scaling) of an adapter on the head.
    replaced: (tokens `(n,)`, rows `(n, features)`); these rows replace those of the weight and its adapter.
    logit_scale, softcap: logits z become c * tanh(logit_scale * z / c) with c = softcap.
    reduction: `mean` over labelled tokens (NaN without any, as in torch) or `sum`.

    Products are in hidden's dtype (see `product_dtype`), everything else in fp32. Gradients: hidden, weight, bias, A, B
    and replaced rows, where they require one. Raises InputError for shapes, labels or options that do not fit.
    """
    if reduction not in ("mean", "sum"):
        raise InputError(f"reduction must be mean or sum; got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
    options = HeadOptions(logit_scale, softcap, label_smoothing)
    call = head_call(hidden, weight, labels, bias, lora, replaced, ignore_index, options)
    loss: Tensor = _LinearCrossEntropy.apply(call.labels, call.options, call.rows, *call.head)
    return loss if reduction == "sum" else loss / call.kept.numel()
