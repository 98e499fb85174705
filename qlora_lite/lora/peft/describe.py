"""What an adapter on disk is, from its configuration and the header of its tensors: no model, no tensor is read."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite.checkpoints.base_identity import BaseIdentity, read_base_identity
from qlora_lite.checkpoints.safetensors_read import StoredTensor
from qlora_lite.errors import CheckpointError
from qlora_lite.lora.config import LoraConfig
from qlora_lite.lora.peft.keys import (
    CONFIG_FILE,
    TENSOR_FILE,
    adapter_tensors,
    layer_and_part,
    parameter_targets,
    read_peft_config,
    written_tensors,
)
from qlora_lite.lora.peft.save_load import lora_numbers
from qlora_lite.lora.variants import variant_of
from qlora_lite.surgery import answers_to

# peft's names for the adapters on stacks of experts (target_parameters), which hold A of all experts in one matrix.
# Of what else target_parameters names, a router's weight, patterns mean the weight and not the module.
STACK_ENDS = (".experts", ".experts.base_layer")


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer's adapter; `bytes` is the size of all its tensors.

    kind: `linear`, `router`, `embedding`, `convolution` or `experts`.
    """

    name: str
    kind: str
    rank: int
    alpha: float
    scaling: float
    parameters: int
    bytes: int

    @property
    def last(self) -> str:
        """The last part of the name, which layers of one sort have in common."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter as its files say it.

    layers: in the order of their names. keys: as the file has them. beside: {key: bytes} of tensors that belong
    to no LoraLayer: modules that were trained whole, biases, copies of base weights. parameters and bytes are of
    all tensors. base: where the model came from, None if that is not said; trained_on: what it was (base_identity.py).
    """

    folder: Path
    config: dict[str, Any]
    layers: tuple[AdaptedLayer, ...]
    keys: tuple[str, ...]
    beside: dict[str, int]
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    trained_on: BaseIdentity | None

    @property
    def base(self) -> str | None:
        named = self.config.get("base_model_name_or_path")
        return str(named) if named else None

    @property
    def variant(self) -> str:
        return variant_of(self.config).name

    @property
    def use_rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`: the layers by their last names."""
        return {
            "adapter": str(self.folder),
            "base_model": self.base,
            "trained_on": None if self.trained_on is None else self.trained_on.to_json(),
            "variant": self.variant,
            "use_rslora": self.use_rslora,
            "layers": len(self.layers),
            "by_name": [group_json(group) for group in grouped(self.layers)],
            "beside": self.beside,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "dtypes": list(self.dtypes),
        }


def grouped(layers: Iterable[AdaptedLayer]) -> list[list[AdaptedLayer]]:
    """The layers of one kind and last name together."""
    groups: dict[tuple[str, str], list[AdaptedLayer]] = {}
    for layer in layers:
        groups.setdefault((layer.kind, layer.last), []).append(layer)
    return [groups[key] for key in sorted(groups)]


def group_json(group: list[AdaptedLayer]) -> dict[str, Any]:
    """One line about layers of one sort: how many, and the numbers that they have."""
    return {
        "name": group[0].last,
        "kind": group[0].kind,
        "layers": len(group),
        "ranks": sorted({layer.rank for layer in group}),
        "alphas": sorted({layer.alpha for layer in group}),
        "scalings": sorted({layer.scaling for layer in group}),
        "parameters": sum(layer.parameters for layer in group),
        "bytes": sum(layer.bytes for layer in group),
    }


def _bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _kind(name: str, lora_A: StoredTensor, by_parameter: Collection[str]) -> str:
    if name.endswith(STACK_ENDS):
        return "experts"
    if any(answers_to(f"{name}.weight", target) for target in by_parameter):
        return "router"
    if "lora_embedding_A" in lora_A.name:
        return "embedding"
    return "linear" if len(lora_A.shape) == 2 else "convolution"


def _layer(
    name: str, parts: dict[str, StoredTensor], numbers: LoraConfig, by_parameter: Collection[str], path: Path
) -> AdaptedLayer:
    if lost := [part for part in ("lora_A", "lora_B") if not len(getattr(parts.get(part), "shape", ())) > 1]:
        raise CheckpointError(f"{path} has no matrix {' and '.join(lost)} for {name}")
    kind = _kind(name, parts["lora_A"], by_parameter)
    called = f"{name}.weight" if kind == "router" else name
    rank, alpha = numbers.rank_of(called), numbers.alpha_of(called)
    held = parts["lora_A"].shape[0], parts["lora_B"].shape[1]
    if kind != "experts" and held != (rank, rank):
        raise CheckpointError(f"{path} has A and B of ranks {held} for {name}, and {CONFIG_FILE} says {rank}")
    tensors = list(parts.values())
    return AdaptedLayer(
        name,
        kind,
        rank,
        alpha,
        alpha / (math.sqrt(rank) if numbers.use_rslora else rank),
        sum(math.prod(tensor.shape) for tensor in tensors),
        sum(map(_bytes, tensors)),
    )


def adapter_facts(folder: str | Path) -> AdapterFacts:
    """Reads what an adapter is. CheckpointError for files that are missing, damaged or contradict each other."""
    folder = Path(folder)
    config = read_peft_config(folder / CONFIG_FILE)
    numbers = lora_numbers(config, folder / CONFIG_FILE)
    by_parameter = parameter_targets(config, folder / CONFIG_FILE)
    tensors = adapter_tensors(folder)
    parts: dict[str, dict[str, StoredTensor]] = {}
    beside: dict[str, int] = {}
    for key, tensor in tensors.items():
        at = layer_and_part(key)
        if at is None:
            beside[tensor.name] = _bytes(tensor)
        else:
            parts.setdefault(at[0], {})[at[1]] = tensor
    if not tensors:
        raise CheckpointError(f"{folder / TENSOR_FILE} is empty")
    return AdapterFacts(
        folder,
        config,
        tuple(_layer(name, parts[name], numbers, by_parameter, folder / TENSOR_FILE) for name in sorted(parts)),
        tuple(sorted(written_tensors(folder))),
        beside,
        sum(math.prod(tensor.shape) for tensor in tensors.values()),
        sum(map(_bytes, tensors.values())),
        tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        read_base_identity(folder),
    )
