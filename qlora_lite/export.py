"""`export_merged`: the model that was trained, as an ordinary checkpoint without adapters or packed weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import hub
from qlora_lite.config import FLOAT_DTYPES, is_count, require
from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.finite import cast_finite
from qlora_lite.lora import LoraLayer
from qlora_lite.quantize import PackedWeight
from qlora_lite.storage import PlannedTensor, check_apart, new_folder, write_sharded

DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the plain checkpoint comes from: `identity` is equal for tensors that are tied."""

    identity: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[torch.dtype], Tensor]
    adapted: bool = False


def _of_tensor(tensor: Tensor, name: str) -> _Source:
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        return _Source(id(tensor), shape, tensor.dtype, lambda dtype: tensor)
    return _Source(id(tensor), shape, tensor.dtype, lambda dtype: cast_finite(tensor.detach(), dtype, name))


def _of_packed(packed: PackedWeight, name: str) -> _Source:
    def make(dtype: torch.dtype) -> Tensor:
        return cast_finite(packed.dequantize(torch.float32), dtype, name)

    return _Source(id(packed), tuple(packed.shape), torch.float32, make)


def _of_adapted(layer: LoraLayer, name: str) -> _Source:
    base: Any = layer.base_layer.weight
    make = functools.partial(layer.effective_weight, name=name)
    return _Source(id(base), tuple(base.shape), torch.float32, make, adapted=True)


def plain_sources(model: nn.Module) -> Iterator[tuple[str, _Source]]:
    """Every tensor that the model would have without adapters and packing, under the name that it would have."""

    def visit(module: nn.Module, prefix: str) -> Iterator[tuple[str, _Source]]:
        if isinstance(module, LoraLayer):
            yield f"{prefix}weight", _of_adapted(module, f"{prefix}weight")
            for name, source in visit(module.base_layer, prefix):
                if name != f"{prefix}weight":
                    yield name, source
            return
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}{key}", _of_tensor(parameter, f"{prefix}{key}")
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield f"{prefix}{key}", _of_tensor(buffer, f"{prefix}{key}")
        for key, child in module._modules.items():
            if isinstance(child, PackedWeight):
                yield f"{prefix}{key}", _of_packed(child, f"{prefix}{key}")
            elif child is not None:
                yield from visit(child, f"{prefix}{key}.")

    return visit(model, "")


def plan_export(model: nn.Module, dtype: torch.dtype) -> dict[str, PlannedTensor]:
    """The plain checkpoint's tensors in `dtype`, tied ones once. TargetError if one of a tied pair is adapted alone."""
    plan: dict[str, PlannedTensor] = {}
    first: dict[int, tuple[str, bool]] = {}
    aliases = hub.tied_names(model)
    for name, source in plain_sources(model):
        # Only what the config ties is found again by who loads the checkpoint; other shared tensors are written twice.
        if source.identity in first and {name, first[source.identity][0]} & aliases:
            other, adapted = first[source.identity]
            if adapted or source.adapted:
                raise TargetError(
                    f"{name} and {other} are one weight, and an adapter is on one of them: a merged checkpoint would "
                    f"change both; save the adapter instead, or train without it"
                )
            continue
        first[source.identity] = (name, source.adapted)
        floating = source.dtype.is_floating_point
        made = functools.partial(source.make, dtype)
        plan[name] = PlannedTensor(source.shape, dtype if floating else source.dtype, made)
    return plan


def export_merged(
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype = torch.float16,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> list[str]:
    """Writes W0 + (alpha / r) B A of every layer, unpacked and summed in fp32 and cast, as safetensors shards.

    The folder also gets config, generation config, tokenizer and chat template, and loads with
    `AutoModelForCausalLM.from_pretrained`. Tensors are made one at a time; the model is not changed, and need not be
    merged. Returns the names of the tensor files. Raises QuantizationError, naming the tensor, for values above
    `dtype`'s range (fp16: 65,504), CheckpointError for a folder with something in it unless `overwrite`; what was
    there before is then untouched.
    """
    if dtype not in FLOAT_DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {dtype}")
    require(is_count(max_shard_bytes, 1), "max_shard_bytes must be an integer of at least 1", max_shard_bytes)
    if getattr(model, "config", None) is None:
        raise ConfigError(f"export needs a transformers model with a config; got a {type(model).__name__}")
    plan = plan_export(model, dtype)
    source = hub.source_folder(model)
    check_apart(Path(folder), source)
    with new_folder(Path(folder), overwrite) as temporary:
        files = write_sharded(temporary, plan, max_shard_bytes)
        hub.save_companions(model, source, temporary, dtype)
    return files
