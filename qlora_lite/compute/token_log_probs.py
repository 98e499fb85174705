"""Log-probabilities of labels under a linear head, one for each token, without the logits of all tokens.

    log_probs = F.log_softmax(z, -1).gather(-1, labels)        z = softcap(scale * (H W^T + b)) / temperature

Trainers of preferences and of reinforcement learning weigh these themselves, so the gradient of a token's
log-probability comes in backward only. If the head is frozen and has no adapter, the derivative by the token's hidden
state, a vector, is formed in forward while its logits are there, and multiplied by that gradient in backward.
Otherwise,
and for the gradient of the entropy, the logits are computed again. Memory is bounded as in cross_entropy.py.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lite.compute.cross_entropy import (
    IGNORE_INDEX,
    GradientSums,
    HeadOptions,
    HeadTensors,
    chunk_gradients,
    head_call,
    logit_chunks,
    slope_of_products,
    softmax_input,
    softmax_parts,
)
from qlora_lite.compute.products.frozen_weight import Weight
from qlora_lite.errors import InputError

STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class TokenStatistics(NamedTuple):
    """Figures of the distribution p of each token, of the shape of the labels; 0 or False where there is no label.

    log_probs: log p[label]. entropy: -sum p log p. log_sum_sq_probs: log sum p^2. mean_logits: the mean of z.
    is_top1: whether the label is the first of the most likely tokens. Those that were not asked for are None.
    log_probs and entropy are differentiable.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def _fill(figures: dict[str, Tensor], part: slice, z: Tensor, labels: Tensor) -> Tensor:
    """Sets the figures of some rows from their z `(rows, vocabulary)`. Returns p, in place of z."""
    of_label = z.gather(1, labels.unsqueeze(1))
    if "is_top1" in figures:
        figures["is_top1"][part] = z.argmax(1) == labels
    if "mean_logits" in figures:
        figures["mean_logits"][part] = z.mean(1)
    largest = z.amax(1, keepdim=True)
    before = z.clone() if "entropy" in figures else None
    total = z.sub_(largest).exp_().sum(1, keepdim=True)
    log_z = largest + total.log()
    p = z.div_(total)
    figures["log_probs"][part] = (of_label - log_z).squeeze(1)
    figures["log_z"][part] = log_z.squeeze(1)
    if before is not None:  # -sum p log p = log_z - sum p z
        figures["entropy"][part] = log_z.squeeze(1) - torch.linalg.vecdot(p, before)
    if "log_sum_sq_probs" in figures:
        figures["log_sum_sq_probs"][part] = torch.linalg.vecdot(p, p).log()
    return p


def _slope(z: Tensor, labels: Tensor, saved: dict[str, Tensor], part: slice) -> Tensor:
    """Returns the derivative of the weighted figures by z, in place of z.

    With the gradients g of log p[label] and e of the entropy H, and y the one-hot label:
    slope = g (y - p) - e p (log p + H).
    """
    log_p = z.sub_(saved["log_z"][part].unsqueeze(1))
    p = log_p.exp()
    if "of_entropy" in saved:
        slope = log_p.add_(saved["entropy"][part].unsqueeze(1)).mul_(-saved["of_entropy"][part].unsqueeze(1)).mul_(p)
    else:
        slope = log_p.zero_()
    if "of_log_probs" in saved:
        grad = saved["of_log_probs"][part].unsqueeze(1)
        slope.sub_(p.mul_(grad)).scatter_add_(1, labels.unsqueeze(1), grad)
    return slope


class _LinearLogProbs(torch.autograd.Function):
    """log_probs `(n,)`, and the further figures, of hidden states `(n, features)`."""

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor,
        o: HeadOptions,
        names: Collection[str],
        hidden: Tensor,
        *tensors: Any,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        head, needs = HeadTensors(*tensors), ctx.needs_input_grad[3:]
        derivative = torch.empty_like(hidden) if needs[0] and not any(needs[1:]) else None
        names = ("log_probs", "log_z", *names)
        figures = {name: torch.zeros(hidden.shape[0], device=hidden.device) for name in names}
        for chunk, rows, logits in logit_chunks(hidden, head, o):
            own, own_labels = {name: figure[chunk] for name, figure in figures.items()}, labels[chunk]
            for part in softmax_parts(logits):
                z, curve = softmax_input(logits[part], head.bias, o, derivative is not None)
                p = _fill(own, part, z, own_labels[part])
                if derivative is not None:
                    picked = own_labels[part].unsqueeze(1)
                    slope = p.neg_().scatter_add_(1, picked, torch.ones_like(picked, dtype=p.dtype))
                    logits[part] = slope_of_products(slope, curve, o)
            if derivative is not None:
                derivative[chunk] = chunk_gradients(rows, head, logits, o, GradientSums())
            del logits
        ctx.save_for_backward(hidden, derivative, labels, figures["log_z"], figures.get("entropy"), *head[1:])
        ctx.weight, ctx.options, ctx.needs = head.weight, o, needs
        is_top1 = figures["is_top1"].bool() if "is_top1" in figures else None
        further = (*(figures.get(name) for name in STATISTICS[1:-1]), is_top1)
        ctx.mark_non_differentiable(*(figure for figure in further if figure is not None))
        return figures["log_probs"], figures.get("entropy"), *further

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, of_entropy: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        hidden, derivative, labels, log_z, entropy, *tensors = ctx.saved_tensors
        if grad is not None and of_entropy is None and derivative is not None:
            return *(None,) * 3, (derivative * grad.unsqueeze(1)).to(hidden.dtype), *(None,) * 5
        head, o = HeadTensors(ctx.weight, *tensors), ctx.options
        given = {"log_z": log_z, "entropy": entropy, "of_log_probs": grad, "of_entropy": of_entropy}
        saved = {name: value for name, value in given.items() if value is not None}
        sums = GradientSums.of(head, ctx.needs[1:])
        gradient = torch.empty_like(hidden) if ctx.needs[0] else None
        for chunk, rows, logits in logit_chunks(hidden, head, o):
            own = {name: value[chunk] for name, value in saved.items()}
            for part in softmax_parts(logits):
                z, curve = softmax_input(logits[part], head.bias, o, True)
                slope = slope_of_products(_slope(z, labels[chunk][part], own, part), curve, o)
                logits[part] = slope
                sums.add("bias", slice(None), functools.partial(slope.sum, 0))
            grad_rows = chunk_gradients(rows, head, logits, o, sums)
            if gradient is not None:
                gradient[chunk] = grad_rows
            del logits
        found = [sums[name].to(tensor.dtype) if name in sums else None for name, tensor in head._asdict().items()]
        return None, None, None, gradient, *found


def linear_log_probs(
    hidden: Tensor,
    weight: Weight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    lora: tuple[Tensor, Tensor, float] | None = None,
    replaced: tuple[Tensor, Tensor] | None = None,
    statistics: Collection[str] = (),
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> TokenStatistics:
    """Returns the log-probability of each label under a linear head, and further figures, without making the logits.

    hidden: `(..., features)`. labels: `(...)`, int64; -100 where a token has no label.
    weight, bias, lora, replaced, softcap, logit_scale: as in `linear_cross_entropy`. temperature: divides z.
    statistics: names of STATISTICS to compute too. All figures are fp32, except `is_top1`, which is boolean.

    Gradients of log_probs and entropy: hidden, weight, bias, A, B and replaced rows, where they require one. Raises
    InputError for shapes, labels or options that do not fit.
    """
    if unknown := [name for name in statistics if name not in STATISTICS]:
        raise InputError(f"statistics must be of {', '.join(STATISTICS)}; got {', '.join(unknown)}")
    if not temperature > 0:
        raise InputError(f"temperature must be above 0; got {temperature}")
    options = HeadOptions(logit_scale, softcap, temperature=temperature)
    call = head_call(hidden, weight, labels, bias, lora, replaced, IGNORE_INDEX, options)
    asked = tuple(dict.fromkeys(statistics))
    figures = _LinearLogProbs.apply(call.labels, call.options, asked, call.rows, *call.head)
    names = zip(TokenStatistics._fields, figures, strict=True)
    return TokenStatistics(**{name: _spread(own, call.kept, labels.shape) for name, own in names if own is not None})


def _spread(figure: Tensor, kept: Tensor, shape: torch.Size) -> Tensor:
    """Returns the figures of the labelled tokens in their places, 0 elsewhere."""
    return figure.new_zeros(shape.numel()).index_copy(0, kept, figure).view(shape)
