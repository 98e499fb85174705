"""Describes an adapter on disk from its configuration and the header of its tensor file: no model, no tensor values."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_lite.checkpoints.base_identity import BaseIdentity, read_base_identity
from qlora_lite.checkpoints.safetensors_read import StoredTensor
from qlora_lite.errors import CheckpointError
from qlora_lite.lora.config import LoraConfig
from qlora_lite.lora.peft.keys import TENSOR_FILE, adapter_tensors, file_tensors, layer_and_part
from qlora_lite.lora.peft.options import CONFIG_FILE, lora_config, read_peft_config, target_parameters
from qlora_lite.lora.variants import variant_of
from qlora_lite.surgery import name_matches

# Endings of layers' names in peft's keys of adapters on stacks of experts, which hold A of all experts in one matrix.
STACK_ENDINGS = (".experts", ".experts.base_layer")


@dataclass(frozen=True)
class AdaptedLayer:
    """The numbers of one adapted layer; parameters and bytes are those of all its tensors.

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
        """The last part of the name, the same for all layers of one sort."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class AdapterDescription:
    """An adapter as its files describe it.

    layers: in the order of their names. keys: those in the file. auxiliary: {key: bytes} of the tensors that belong to
    no LoraLayer: modules_to_save, biases, token rows, copies of base weights. parameters, bytes: of all tensors.
    trained_on: the identity of the base (base_identity.py), or None if no file gives it.
    """

    folder: Path
    config: dict[str, object]
    layers: tuple[AdaptedLayer, ...]
    keys: tuple[str, ...]
    auxiliary: dict[str, int]
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    trained_on: BaseIdentity | None

    @property
    def base(self) -> str | None:
        """The name or path of the base model, or None if the configuration has none."""
        named = self.config.get("base_model_name_or_path")
        return str(named) if named else None

    @property
    def variant(self) -> str:
        """The name of the variant of LoRA."""
        return variant_of(self.config).name

    @property
    def use_rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))

    def to_json(self) -> dict[str, object]:
        """Returns plain data for `json.dumps`, with the layers grouped by last name."""
        return {
            "adapter": str(self.folder),
            "base_model": self.base,
            "trained_on": None if self.trained_on is None else self.trained_on.to_json(),
            "variant": self.variant,
            "use_rslora": self.use_rslora,
            "layers": len(self.layers),
            "by_name": [group.to_json() for group in group_layers(self.layers)],
            "auxiliary": self.auxiliary,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "dtypes": list(self.dtypes),
        }


@dataclass(frozen=True)
class LayerGroup:
    """The layers of one kind and last name, and the different numbers that they have."""

    name: str
    kind: str
    layers: int
    ranks: list[int]
    alphas: list[float]
    scalings: list[float]
    parameters: int
    bytes: int

    def to_json(self) -> dict[str, object]:
        """Returns plain data for `json.dumps`."""
        return asdict(self)


def group_layers(layers: Iterable[AdaptedLayer]) -> list[LayerGroup]:
    """Groups layers by kind and last name, in that order."""
    groups: dict[tuple[str, str], list[AdaptedLayer]] = {}
    for layer in layers:
        groups.setdefault((layer.kind, layer.last), []).append(layer)
    return [
        LayerGroup(
            name=last,
            kind=kind,
            layers=len(group),
            ranks=sorted({layer.rank for layer in group}),
            alphas=sorted({layer.alpha for layer in group}),
            scalings=sorted({layer.scaling for layer in group}),
            parameters=sum(layer.parameters for layer in group),
            bytes=sum(layer.bytes for layer in group),
        )
        for (kind, last), group in sorted(groups.items())
    ]


def _bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _kind(name: str, lora_A: StoredTensor, parameters: Collection[str]) -> str:
    if name.endswith(STACK_ENDINGS):
        return "experts"
    # Besides stacks, target_parameters names the weights of routers.
    if any(name_matches(f"{name}.weight", target) for target in parameters):
        return "router"
    if "lora_embedding_A" in lora_A.name:
        return "embedding"
    return "linear" if len(lora_A.shape) == 2 else "convolution"


def _layer(
    name: str, parts: dict[str, StoredTensor], config: LoraConfig, parameters: Collection[str], path: Path
) -> AdaptedLayer:
    if missing := [part for part in ("lora_A", "lora_B") if not len(getattr(parts.get(part), "shape", ())) > 1]:
        raise CheckpointError(f"{path} has no matrix {' and '.join(missing)} for {name}")
    kind = _kind(name, parts["lora_A"], parameters)
    peft_name = f"{name}.weight" if kind == "router" else name
    rank, alpha = config.rank_of(peft_name), config.alpha_of(peft_name)
    in_file = parts["lora_A"].shape[0], parts["lora_B"].shape[1]
    if kind != "experts" and in_file != (rank, rank):
        raise CheckpointError(f"{path} has A and B of ranks {in_file} for {name}, and {CONFIG_FILE} says {rank}")
    tensors = list(parts.values())
    return AdaptedLayer(
        name,
        kind,
        rank,
        alpha,
        alpha / (math.sqrt(rank) if config.use_rslora else rank),
        sum(math.prod(tensor.shape) for tensor in tensors),
        sum(map(_bytes, tensors)),
    )


def describe_adapter(folder: str | Path) -> AdapterDescription:
    """Describes the adapter in a folder. Raises CheckpointError for files that are missing, damaged or inconsistent."""
    folder = Path(folder)
    options = read_peft_config(folder / CONFIG_FILE)
    config = lora_config(options, folder / CONFIG_FILE)
    parameters = target_parameters(options, folder / CONFIG_FILE)
    tensors = adapter_tensors(folder)
    parts: dict[str, dict[str, StoredTensor]] = {}
    auxiliary: dict[str, int] = {}
    for key, tensor in tensors.items():
        split = layer_and_part(key)
        if split is None:
            auxiliary[tensor.name] = _bytes(tensor)
        else:
            parts.setdefault(split[0], {})[split[1]] = tensor
    if not tensors:
        raise CheckpointError(f"{folder / TENSOR_FILE} is empty")
    return AdapterDescription(
        folder,
        options,
        tuple(_layer(name, parts[name], config, parameters, folder / TENSOR_FILE) for name in sorted(parts)),
        tuple(sorted(file_tensors(folder))),
        auxiliary,
        sum(math.prod(tensor.shape) for tensor in tensors.values()),
        sum(map(_bytes, tensors.values())),
        tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        read_base_identity(folder),
    )
