"""A step of generation: one token for each sequence, in which operations are many and each is small.

Two parts of transformers' modules are exchanged for shorter ones, where they are recognized and the step is small:
norms (their own forward gives the same on a probe), and attention of one query without a mask on a CPU. Nothing else
changes: prompts, and modules that are not recognized, compute as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite.compute.cpu_attention import asks_for_more, one_query_attention
from qlora_lite.compute.devices import on_cpu
from qlora_lite.compute.lora_linear import FEW_ROWS
from qlora_lite.compute.norms_and_gates import norm_eps, short_norm
from qlora_lite.patches import patched_attention, patched_forward


def _norm(module: Any, own: Callable[..., Tensor], eps: float, x: Tensor) -> Tensor:
    weight: Tensor = module.weight
    is_small = x.numel() <= FEW_ROWS * x.shape[-1] and not torch.is_grad_enabled()
    return short_norm(x, weight, eps) if is_small and x.dtype == weight.dtype else own(x)


def _attention(own: Callable[..., Any], module: nn.Module, *args: Any, **options: Any) -> Any:
    query, key, value, mask = args[:4] if len(args) >= 4 else (*args, options.get("attention_mask"))
    shares_keys = query.shape[2] == 1 and key.shape[1] < query.shape[1]
    if not shares_keys or mask is not None or not on_cpu(query.device) or asks_for_more(options):
        return own(module, *args, **options)
    return one_query_attention(query, key, value, options.get("scaling")), None


@contextmanager
def short_steps(model: nn.Module) -> Iterator[None]:
    """Within the block a model uses shorter norms and attention in steps of one token for each sequence."""
    with ExitStack() as stack:
        for module in model.modules():
            eps = None if "forward" in vars(module) else norm_eps(module)
            if eps is not None:
                stack.enter_context(patched_forward(module, functools.partial(_norm, module, module.forward, eps)))
        stack.enter_context(patched_attention(model, lambda own: functools.partial(_attention, own)))
        yield
