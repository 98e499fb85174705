"""Rotary position embeddings (arXiv:2104.09864) of queries and keys as one autograd node.

    y = x * cos + turned(x) * sin        turned(x) = (-x2, x1) for the halves x1, x2 of a head's features

Composed of torch's operators, its backward fills a tensor with zeros for each half, and sums four tensors. Here it is

    dx = dy * cos + back(dy * sin)       back(v) = (v2, -v1)

in the layout of dy, which the layers before it read without a copy. Values and gradients are the same bits.

transformers' models call a function of their own module for it, so that function is exchanged while a model trains, if
it gives the same bits on a probe.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._mode_utils import no_dispatch

from qlora_lite.compute.norms_and_gates import probe
from qlora_lite.patches import patched_attribute

NAME = "apply_rotary_pos_emb"
# Of the probe: rows, heads of queries and of keys, tokens, features of a head.
ROWS, HEADS, KEY_HEADS, TOKENS, WIDTH = 2, 3, 1, 5, 8

Rotary = Callable[..., tuple[Tensor, Tensor]]


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    return x.split_with_sizes((x.shape[-1] // 2, x.shape[-1] // 2), -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = _halves(x)
    return (x * cos).add_(torch.cat((-second, first), -1).mul_(sin))


def _rotated_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = _halves(grad * sin)
    return (grad * cos).add_(torch.cat((second, first.neg_()), -1))


class _Rotary(torch.autograd.Function):
    """Queries and keys `(rows, heads, tokens, d)` at their positions. cos, sin `(rows, 1, tokens, d)` are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(query, cos, sin), _rotated(key, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated_back(grad_query, cos, sin), _rotated_back(grad_key, cos, sin), None, None


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns queries and keys `(rows, heads, tokens, d)` turned by the angles of cos and sin `(rows, tokens, d)`."""
    found: tuple[Tensor, Tensor] = _Rotary.apply(query, key, cos.unsqueeze(1), sin.unsqueeze(1))
    return found


def _is_plain(query: Any, key: Any, cos: Any, sin: Any) -> bool:
    """Whether all are tensors of one dtype with angles for every feature, and need gradients but for the angles."""
    tensors = query, key, cos, sin
    if not all(isinstance(tensor, Tensor) for tensor in tensors) or len({tensor.dtype for tensor in tensors}) > 1:
        return False
    if not torch.is_grad_enabled() or cos.requires_grad or sin.requires_grad:
        return False
    shaped = query.dim() == key.dim() == 4 and cos.dim() == sin.dim() == 3 and query.requires_grad
    return shaped and bool(query.shape[-1] == key.shape[-1] == cos.shape[-1] == sin.shape[-1])


def _called(own: Rotary, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any) -> Any:
    if args or options or not _is_plain(query, key, cos, sin):
        return own(query, key, cos, sin, *args, **options)
    return rotary(query, key, cos, sin)


def computes_rotary(function: Callable[..., Any]) -> bool:
    """Whether a function gives the same bits as `rotary` on a probe."""
    with no_dispatch(), torch.no_grad():
        query, key = (
            probe(seed, torch.float32, ROWS, heads, TOKENS, WIDTH) for seed, heads in ((0, HEADS), (1, KEY_HEADS))
        )
        cos, sin = (probe(seed, torch.float32, ROWS, TOKENS, WIDTH) for seed in (2, 3))
        try:
            found = function(query, key, cos, sin)
        except Exception:  # the code of a model may fail on the probe in any way
            return False
        expected = rotary(query, key, cos, sin)
        return isinstance(found, tuple) and len(found) == 2 and all(map(_same, found, expected))


def _same(found: object, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)


def _sources(model: nn.Module) -> Iterator[ModuleType]:
    """Yields the Python modules of a model's classes that have a function for rotary embeddings, each once."""
    for name in dict.fromkeys(type(module).__module__ for module in model.modules()):
        source = sys.modules.get(name)
        if source is not None and callable(vars(source).get(NAME)):
            yield source


@contextmanager
def fused_rotary(model: nn.Module) -> Iterator[None]:
    """Within the block the functions for rotary embeddings that a model's classes call are `rotary`, if recognized.

    They are functions of transformers' modules, so the block concerns the whole process.
    """
    with ExitStack() as stack:
        for source in _sources(model):
            own = vars(source)[NAME]
            if computes_rotary(own):
                stack.enter_context(patched_attribute(source, NAME, functools.partial(_called, own)))
        yield
