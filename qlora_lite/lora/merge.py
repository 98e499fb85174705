"""Merging in memory: every adapted layer of a model uses W0 + scaling * B A, and goes back."""

from __future__ import annotations

import torch
from torch import nn

from qlora_lite.errors import TargetError
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.lora.multi_adapter import active_adapter, use_adapter_


def _adapted(model: nn.Module) -> dict[str, LoraLayer]:
    layers = lora_layers(model)
    if not layers:
        raise TargetError("the model has no adapters, or none in use; add_lora_ or load_adapter_ puts them in")
    return layers


def merge_lora_(model: nn.Module, dtype: torch.dtype | None = None, *, name: str | None = None) -> None:
    """Makes every adapted layer use its merged weight, unpacked, summed in fp32 and cast (see LoraLayer).

    Costs one dense weight per adapted layer until `unmerge_lora_`. On QuantizationError (fp16 overflow, NaN) or
    ConfigError (a layer that must not be merged) no layer is merged that was not before.
    name: of several adapters, uses this one first (named_adapters.use_adapter_); None: the one in use.
    """
    before = active_adapter(model)
    if name is not None:
        use_adapter_(model, name)
    done: list[LoraLayer] = []
    try:
        for path, layer in _adapted(model).items():
            fresh = not layer.merged
            layer.merge_weights(dtype, f"{path}.weight")
            if fresh:
                done.append(layer)
    except Exception:
        for layer in done:
            layer.unmerge_weights()
        use_adapter_(model, before)
        raise


def unmerge_lora_(model: nn.Module) -> None:
    """Makes every adapted layer use W0 and its low-rank term apart again; W0 is what it was, bit for bit."""
    for layer in _adapted(model).values():
        layer.unmerge_weights()
