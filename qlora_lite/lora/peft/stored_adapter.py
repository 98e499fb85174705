"""An adapter read from peft's files and matched to the layers of a model, with everything in it that does not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.auxiliary_layers import TrainableTokensLayer
from qlora_lite.lora.config import LoraConfig
from qlora_lite.lora.experts import unpacked_stacks
from qlora_lite.lora.kinds import RouterKind, kind_of
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.lora.peft.auxiliary import StoredAuxiliary
from qlora_lite.lora.peft.experts import stack_key_names, unflatten_stacks
from qlora_lite.lora.peft.keys import (
    BASE_COPY,
    PREFIX,
    TENSOR_FILE,
    TOKEN_ADAPTER,
    adapter_tensors,
    layer_and_part,
    peft_key,
)
from qlora_lite.lora.peft.options import (
    CONFIG_FILE,
    labels_of_adapter,
    lora_config,
    read_supported_config,
    task_of_type,
)
from qlora_lite.lora.peft.targets import target_problems, targeted_parameters
from qlora_lite.lora.targets import TargetedLayer
from qlora_lite.lora.variants import VARIANTS, Variant, combination_problems, variant_contradictions
from qlora_lite.tasks import task_of
from qlora_lite.weight_readers import described_reads

LayerTensors = dict[str, dict[str, Tensor]]

GROUPED = (
    " (an A that reads the inputs of all groups, as peft's does, is not an update of a grouped convolution's kernel)"
)


def _adapted_names(keys: Collection[str]) -> set[str]:
    """Returns the names of the layers that have an A."""
    return {split[0] for key in keys if (split := layer_and_part(key)) is not None and split[1] == "lora_A"}


def _by_layer(tensors: dict[str, Tensor], path: Path) -> LayerTensors:
    """Returns {layer: {"lora_A": A, "lora_B": B}}. Raises CheckpointError that lists all foreign or missing keys."""
    layers: LayerTensors = {}
    foreign = []
    for key, tensor in tensors.items():
        if key.startswith(PREFIX) and key.endswith(BASE_COPY):
            continue
        name, part = layer_and_part(key) or ("", "")
        if not part or part in layers.get(name, {}):
            foreign.append(key)
            continue
        layers.setdefault(name, {})[part] = tensor
    if foreign:
        raise CheckpointError(
            f"{path} has keys that belong to no adapter, or that repeat a tensor of a layer: {listing(sorted(foreign))}"
        )
    if single := sorted(name for name, parts in layers.items() if not {"lora_A", "lora_B"} <= parts.keys()):
        raise CheckpointError(f"{path} has only one of A and B for: {listing(single)}")
    if not layers:
        raise CheckpointError(f"{path} is empty")
    return layers


def _base_copy_problems(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns a sentence for each base weight in the file that is not the model's: another base was adapted."""
    modules = dict(model.named_modules())
    problems = []
    for key, tensor in tensors.items():
        if not key.endswith(BASE_COPY):
            continue
        name = key[len(PREFIX) : -len(BASE_COPY)].removesuffix(TOKEN_ADAPTER)
        module = modules.get(name)
        base = module.base_layer if isinstance(module, (LoraLayer, TrainableTokensLayer)) else module
        weight = getattr(base, "weight", None)
        if weight is None or weight.shape != tensor.shape:
            problems.append(f"{name} comes with a base weight {tuple(tensor.shape)} that fits no layer of the model")
        elif isinstance(weight, Tensor) and not weight.is_meta and not torch.equal(weight, tensor.to(weight)):
            problems.append(f"{name} comes with a base weight that differs from the model's")
    return problems


def _tying_problems(model: nn.Module, layers: LayerTensors) -> list[str]:
    """Returns a sentence for each tied pair with different A and B.

    peft's ensure_weight_tying makes them one adapter: A and B of a head are B^T and A^T of the embedding.
    """
    problems = []
    for alias, source in architecture.tied_pairs(model):
        head, embedding = (layers.get(name.removesuffix(".weight"), {}) for name in (alias, source))
        swapped = {"lora_A": embedding.get("lora_B"), "lora_B": embedding.get("lora_A")}
        expected = {part: tensor.T.float() for part, tensor in swapped.items() if tensor is not None}
        if head.keys() != expected.keys() or any(
            not torch.equal(head[part].float(), expected[part]) for part in expected
        ):
            problems.append(f"ensure_weight_tying is set, and {alias} and {source} do not have the same adapter")
    return problems


def _tensor_problems(
    layer: TargetedLayer, in_model: nn.Module | None, tensors: Mapping[str, Tensor], variant: Variant
) -> list[str]:
    """Returns a sentence for each tensor that the layer cannot take; in_model: its LoraLayer, if it has one."""
    problems = []
    grouped = "" if getattr(layer.module, "groups", 1) == 1 else GROUPED
    shapes = variant.file_shapes(layer.kind, layer.module, layer.rank)
    for part, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[part]:
            problems.append(f"{layer.name}.{part} is {tuple(tensor.shape)}, the layer needs {shapes[part]}{grouped}")
        elif not tensor.is_floating_point():
            problems.append(f"{layer.name}.{part} is of {tensor.dtype}, which is not a float dtype")
        elif isinstance(in_model, LoraLayer) and getattr(in_model, part).numel() != tensor.numel():
            problems.append(f"{layer.name} has an adapter of rank {in_model.rank} already; remove_lora_ removes it")
        elif not tensor.isfinite().all():
            problems.append(f"{layer.name}.{part} holds NaN or infinity")
    return problems


def _resolve(modules: Mapping[str, nn.Module], names: Collection[str], config: LoraConfig) -> dict[str, TargetedLayer]:
    """Returns those of the named layers that can be adapted. The patterns in `config` are peft's (`peft_name`)."""
    found = {}
    for name in names:
        module = modules.get(name)
        base = module.base_layer if isinstance(module, LoraLayer) else module
        kind = None if base is None else kind_of(base)
        if base is not None and kind is not None:
            peft_name = f"{name}.weight" if isinstance(kind, RouterKind) else name
            found[name] = TargetedLayer(name, base, kind, config.rank_of(peft_name), config.alpha_of(peft_name))
    return found


def _check_adapter_task(model: nn.Module, folder: Path, options: dict[str, object]) -> None:
    """Raises CheckpointError for the adapter of a classifier on a model without a head of labels."""
    task = task_of_type(options.get("task_type"))
    if task is None or getattr(model, "config", None) is None or task_of(model) is task:
        return
    raise CheckpointError(
        f"{folder} is the adapter of a classifier (task_type {task.peft_type}), and the model is a "
        f"{type(model).__name__}; load the base with task={task.name!r} and labels={labels_of_adapter(folder)!r}"
    )


@dataclass(frozen=True)
class StoredAdapter:
    """The content of an adapter's files, matched to a model.

    options: adapter_config.json. config: those of them that decide what A and B compute. tensors: those of the file by
    current keys, without the auxiliary ones. layer_tensors: {layer: {"lora_A": A, "lora_B": B}}, with the variant's
    other parameters; the matrices of stacks have the model's layout. layers: the layers of layer_tensors that the model
    has and that can be adapted. parameter_layers: the stacks and routers that target_parameters selects. key_names: the
    names of stacks in keys (`stack_key_names`).
    """

    options: dict[str, object]
    config: LoraConfig
    tensors: dict[str, Tensor]
    layer_tensors: LayerTensors
    layers: dict[str, TargetedLayer]
    parameter_layers: dict[str, TargetedLayer]
    key_names: dict[str, str]
    auxiliary: StoredAuxiliary

    @classmethod
    def read(cls, model: nn.Module, folder: Path) -> StoredAdapter:
        """Reads the files of an adapter for this model, which is not changed.

        Raises CheckpointError that lists everything that does not fit.
        """
        options = read_supported_config(folder / CONFIG_FILE)
        _check_adapter_task(model, folder, options)
        config = lora_config(options, folder / CONFIG_FILE)
        tensors = {key: stored.read() for key, stored in adapter_tensors(folder).items()}
        auxiliary = StoredAuxiliary.take_from_(tensors, model, options, _adapted_names(tensors))
        modules = dict(model.named_modules()) | unpacked_stacks(model)
        parameters = _resolve(modules, targeted_parameters(model, options, folder / CONFIG_FILE), config)
        key_names = stack_key_names(model, [layer.name for layer in parameters.values() if layer.is_stack])
        layer_tensors = unflatten_stacks(_by_layer(tensors, folder / TENSOR_FILE), key_names, parameters)
        layers = _resolve(modules, layer_tensors, config)
        stored = cls(options, config, tensors, layer_tensors, layers, parameters, key_names, auxiliary)
        if problems := stored._problems(model):
            raise CheckpointError(f"{folder} does not fit this model: {listing(problems, separator='; ')}")
        return stored

    def _problems(self, model: nn.Module) -> list[str]:
        modules, names = dict(model.named_modules()), self.layer_tensors.keys()
        kinds = {name: layer.kind for name, layer in {**self.layers, **self.parameter_layers}.items()}
        problems = [
            *self.auxiliary.problems,
            *(problem for name in names for problem in self._layer_problems(name, modules.get(name))),
            *_base_copy_problems(model, self.tensors),
            *self.config.unused_patterns([self.layers[n].peft_name if n in self.layers else n for n in names]),
            *described_reads(model, [name for name in names if name not in self.key_names]),
            *target_problems(model, names - self.parameter_layers.keys(), self.options),
            *(
                f"{name} is targeted and has no tensors in the file"
                for name in self.parameter_layers
                if name not in names
            ),
            *combination_problems(kinds, self.config.dropout, VARIANTS[self.config.variant]),
        ]
        if self.options.get("ensure_weight_tying"):
            problems += _tying_problems(model, self.layer_tensors)
        adapted = lora_layers(model).keys()
        if adapted and adapted != names:
            problems.append(
                f"the model has adapters on other layers ({len(adapted)} in the model, {len(names)} in the file)"
            )
        return problems or (self.auxiliary.differences(model) if adapted else [])

    def _layer_problems(self, name: str, in_model: nn.Module | None) -> list[str]:
        """Returns a sentence for each way in which the file does not fit one layer.

        in_model: the module of this name in the model; None for a stack that is still a parameter.
        """
        layer, tensors, variant = self.layers.get(name), self.layer_tensors[name], VARIANTS[self.config.variant]
        if layer is None:
            return [f"{name} is not a layer of this model that can be adapted"]
        keys = [peft_key(self.key_names.get(name, name), layer.kind, part) for part in ("lora_A", "lora_B")]
        if missing := [key for key in keys if key not in self.tensors]:
            return [f"{name} is a layer of another kind in this model: the file should have {' and '.join(missing)}"]
        if contradictions := variant_contradictions(tensors, variant):
            return [f"{name} {contradiction}" for contradiction in contradictions]
        if isinstance(in_model, LoraLayer) and in_model.variant is not variant:
            return [
                f"{name} has an adapter of variant {in_model.variant.name}, and the file one of variant {variant.name}"
            ]
        return _tensor_problems(layer, in_model, tensors, variant)
