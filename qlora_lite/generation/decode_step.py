"""A step of generation: one token for each sequence, in which operations are many and each is small.

Parts of transformers' modules are exchanged for shorter ones, where they are recognized (their own forward gives the
same on a probe) and the step is small: norms, and attention of one query without a mask on a CPU. In prompts too, a
gated activation is multiplied in place, and the output head gets a matrix: transformers gives it the last position of
each sequence, a strided view, for which torch copies a frozen weight once for each sequence. Modules that are not
recognized compute as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lite.architecture import output_head
from qlora_lite.compute.cpu_attention import asks_for_more
from qlora_lite.compute.devices import model_dtype, on_cpu
from qlora_lite.compute.lora_linear import FEW_ROWS
from qlora_lite.compute.norms_and_gates import ACTIVATIONS, mlp_activation, norm_eps, short_norm
from qlora_lite.patches import patched_attention, patched_forward


def _norm(module: Any, own: Callable[..., Tensor], eps: float, x: Tensor) -> Tensor:
    weight: Tensor = module.weight
    is_small = x.numel() <= FEW_ROWS * x.shape[-1] and not torch.is_grad_enabled()
    return short_norm(x, weight, eps) if is_small and x.dtype == weight.dtype else own(x)


def _mlp(module: Any, own: Callable[..., Tensor], activation: str, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return own(x)
    gated = ACTIVATIONS[activation].function(module.gate_proj(x)).mul_(module.up_proj(x))
    y: Tensor = module.down_proj(gated)
    return y


def _head(own: Callable[..., Tensor], x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return own(x)
    return own(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def _short_forward(module: nn.Module, dtype: torch.dtype, head: nn.Module | None) -> Callable[..., Tensor] | None:
    """The shorter forward of a module that is recognized, None for any other."""
    if "forward" in vars(module):
        return None
    if module is head and type(module) is nn.Linear:
        return functools.partial(_head, module.forward)
    eps = norm_eps(module)
    if eps is not None:
        return functools.partial(_norm, module, module.forward, eps)
    activation = mlp_activation(module, dtype)
    return None if activation is None else functools.partial(_mlp, module, module.forward, activation)


def one_query_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Returns the attention `(rows, 1, heads, d)` of one query token `(rows, heads, 1, d)` to all keys.

    Query heads that share a key head become rows of torch's kernel, which otherwise repeats keys and values for each.
    """
    rows, heads, _, width = query.shape
    shared = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    y: Tensor = F.scaled_dot_product_attention(shared, key, value, scale=scale)
    return y.reshape(rows, 1, heads, value.shape[-1])


def _attention(own: Callable[..., Any], module: nn.Module, *args: Any, **options: Any) -> Any:
    query, key, value, mask = args[:4] if len(args) >= 4 else (*args, options.get("attention_mask"))
    shares_keys = query.shape[2] == 1 and key.shape[1] < query.shape[1]
    if not shares_keys or mask is not None or not on_cpu(query.device) or asks_for_more(options):
        return own(module, *args, **options)
    return one_query_attention(query, key, value, options.get("scaling")), None


@contextmanager
def short_steps(model: nn.Module) -> Iterator[None]:
    """Within the block a model answers with fewer and smaller operations, as above."""
    dtype = model_dtype(model)
    head = output_head(model)
    with ExitStack() as stack:
        for module in model.modules():
            shorter = _short_forward(module, dtype, head)
            if shorter is not None:
                stack.enter_context(patched_forward(module, shorter))
        stack.enter_context(patched_attention(model, lambda own: functools.partial(_attention, own)))
        yield
