"""Replaces forward methods of transformers' modules by fused autograd functions that save less for backward.

Three parts of a block are replaced: norms and gated activations (compute/norms_and_gates.py), and on a CPU causal
attention (compute/cpu_attention.py). A module is recognized by its results: its own forward, run on small random
tensors, must equal the fused function bit for bit. Other modules are left as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from qlora_lite.compute.cpu_attention import asks_for_more, causal_attention
from qlora_lite.compute.devices import model_dtype, on_cpu
from qlora_lite.compute.norms_and_gates import gated, mlp_activation, norm_eps, rms_norm
from qlora_lite.patches import patched_attention, patched_forward
from qlora_lite.training.forward.rotary_embedding import fused_rotary
from qlora_lite.training.forward.shared_input import first_argument, prepare_outputs, shares_input, with_shared_input


def _fused_norm(module: nn.Module, own: Callable[..., Tensor], eps: float, x: Tensor) -> Tensor:
    weight: Any = module.weight
    return rms_norm(x, weight, eps) if x.dtype == weight.dtype else own(x)


def _fused_mlp(module: Any, activation: str, x: Tensor) -> Tensor:
    prepare_outputs(x, (module.gate_proj, module.up_proj))
    result: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x), activation))
    return result


def _fused_forward(module: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """Returns the fused forward of a recognized module; None for others and for instances with their own forward."""
    if "forward" in module.__dict__:
        return None
    eps = norm_eps(module)
    if eps is not None:
        return functools.partial(_fused_norm, module, module.forward, eps)
    activation = mlp_activation(module, dtype)
    if activation is not None:
        return functools.partial(_fused_mlp, module, activation)
    if shares_input(module):
        return functools.partial(with_shared_input, module, module.forward, first_argument(module))
    return None


def is_fused_forward(forward: object) -> bool:
    """Whether a module has this forward from `fused_forwards`."""
    return isinstance(forward, functools.partial) and forward.func in (_fused_norm, _fused_mlp, with_shared_input)


class CausalMasks:
    """Tells which masks are causal: every token attends to itself and to no later token. Each mask is checked once."""

    def __init__(self) -> None:
        self._causal = WeakIdKeyDictionary()

    def is_causal(self, mask: Tensor, tokens: int) -> bool:
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, tokens, tokens):
            return False
        if isinstance(mask, FakeTensor):  # it has no values; transformers makes causal masks
            return True
        if mask not in self._causal:
            itself = mask.diagonal(dim1=-2, dim2=-1).all()
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).triu_(1)
            self._causal[mask] = bool(itself & ~(mask & later).any())
        return bool(self._causal[mask])


def fused_attention(own: Callable[..., Any], masks: CausalMasks, module: nn.Module, *args: Any, **options: Any) -> Any:
    """Computes causal attention on a CPU by the fused function, and everything else by transformers' `own` one."""
    query, key, value, mask = args[:4] if len(args) >= 4 else (*args, options.get("attention_mask"))
    tokens = query.shape[2]
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    is_fusible = (
        on_cpu(query.device)
        and query.dtype in (torch.bfloat16, torch.float32)
        and not asks_for_more(options)
        and 1 < tokens == key.shape[2]
        and (causal if mask is None else masks.is_causal(mask, tokens))
    )
    if not is_fusible:
        return own(module, *args, **options)
    scale = options.get("scaling")
    mask = None if mask is None else mask.expand(query.shape[0], -1, -1, -1)
    out = causal_attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, mask)
    return out.transpose(1, 2), None


def fused_forwards(model: nn.Module) -> dict[str, Callable[..., Tensor]]:
    """Returns the fused forward of every recognized module of a model, by name."""
    dtype = model_dtype(model)
    forwards = {name: _fused_forward(module, dtype) for name, module in model.named_modules()}
    return {name: forward for name, forward in forwards.items() if forward is not None}


@contextmanager
def fused(model: nn.Module) -> Iterator[list[str]]:
    """Within the block the model uses fused functions where it can. Yields the names of the modules with a new forward.

    Forward methods and transformers' attention function are restored at the end.
    """
    found = fused_forwards(model)
    with ExitStack() as stack:
        for name, forward in found.items():
            stack.enter_context(patched_forward(model.get_submodule(name), forward))
        stack.enter_context(fused_rotary(model))
        stack.enter_context(
            patched_attention(model, lambda own: functools.partial(fused_attention, own, CausalMasks()))
        )
        yield list(found)
