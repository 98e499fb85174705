"""Saves and loads adapters in peft's two files, `adapter_model.safetensors` and `adapter_config.json`.

The tensors have the shapes of this package, but for convolutions, where they are kernels, and stacks of experts, where
they are flat (experts.py). For grouped convolutions peft has an A of another meaning (convolution.py): neither library
loads the other's, and both raise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qlora_lite.architecture import config_value, text_config
from qlora_lite.checkpoints.atomic_folder import new_folder
from qlora_lite.checkpoints.base_identity import (
    LOAD_REPACKED_HINT,
    MODEL_TYPE,
    PACKED_HASH_KEY,
    check_trained_on_model,
    packed_weights_hash,
    packed_weights_match,
    repacked_weights,
    write_base_identity,
)
from qlora_lite.checkpoints.files import write_json
from qlora_lite.checkpoints.repository.model_card import write_card
from qlora_lite.checkpoints.safetensors_write import PlannedTensor, planned, write_safetensors
from qlora_lite.errors import CheckpointError, TargetError
from qlora_lite.lora.adapters import check_adapter_name, freeze_base_, lora_layers, wrap_layer
from qlora_lite.lora.experts import wrap_stacks_
from qlora_lite.lora.kinds import RouterKind, StackKind
from qlora_lite.lora.layer import DEFAULT_ADAPTER, LoraLayer
from qlora_lite.lora.multi_adapter import active_adapter, adapter_layers, adding_adapter
from qlora_lite.lora.peft.auxiliary import auxiliary_config, auxiliary_tensors
from qlora_lite.lora.peft.card import TrainingRecord, adapter_card
from qlora_lite.lora.peft.config_json import peft_config, set_labels_of_adapter_, write_labels
from qlora_lite.lora.peft.experts import flatten_A, flatten_B, stack_key_names
from qlora_lite.lora.peft.keys import TENSOR_FILE, peft_key
from qlora_lite.lora.peft.lost_layers import lost_in_peft
from qlora_lite.lora.peft.options import CONFIG_FILE
from qlora_lite.lora.peft.stored_adapter import StoredAdapter
from qlora_lite.lora.variants import clear_reference_, ordinary_rank
from qlora_lite.sharding.base import check_whole
from qlora_lite.surgery import replace_modules_


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    overwrite: bool = False,
    *,
    name: str | None = None,
    training: TrainingRecord | None = None,
) -> list[str]:
    """Writes the parameters of all layers, auxiliary parameters, their configuration, and the identity of the base.

    `peft.PeftModel.from_pretrained(base, folder)` reads the adapter. A third file identifies the base that it was
    trained on (base_identity.py), README.md is a model card (card.py), and labels.json names a classifier's labels
    (config_json.py). A card that was edited is kept. Returns sentences about layers whose adapters peft would not load,
    which depends on the type of the model (lost_layers.py); an empty list for most models.

    Ranks and alphas may differ between layers. A layer that counts its update from initial values (PiSSA) is written as
    an ordinary one of twice the rank, for the plain base. An adapter on a base that LoftQ packed again names no base
    model and holds the base's SHA-256 instead, which `load_adapter_` and merges check and peft ignores.

    name: the adapter to save, in use or not (multi_adapter.py); None: the one in use.
    training: what the model card says of the run.

    Raises CheckpointError for a folder that is not empty unless `overwrite`, TargetError for a model without adapters,
    ConfigError for layers that differ in dropout, use_rslora or variant.
    """
    with adapter_layers(model, name) as layers:
        _save(model, layers, Path(folder), overwrite, name in (None, active_adapter(model)), training)
        return layers_lost_in_peft(model, layers)


def layers_lost_in_peft(model: nn.Module, layers: Mapping[str, LoraLayer]) -> list[str]:
    """Returns sentences about those of these layers whose adapters peft would not load."""
    config = text_config(getattr(model, "config", None))
    names = [name for name, layer in layers.items() if not isinstance(layer.kind, (StackKind, RouterKind))]
    return lost_in_peft(str(config_value(config, MODEL_TYPE)), names)


def _save(
    model: nn.Module,
    layers: dict[str, LoraLayer],
    folder: Path,
    overwrite: bool,
    in_use: bool,
    training: TrainingRecord | None,
) -> None:
    if not layers:
        raise TargetError("the model has no adapters to save, or none in use; add_lora_ puts them in")
    if "" in layers:
        raise TargetError(
            "the model itself is the adapted layer, which has no name in peft's files; put it into a container"
        )
    tensors = _layer_tensors(model, layers)
    config = {"bias": "none"} | peft_config(model, layers)
    if in_use:  # auxiliary parameters belong to the adapter in use
        tensors |= {key: planned(values.detach()) for key, _, values in auxiliary_tensors(model)}
        config |= auxiliary_config(model)
    if repacked_weights(model):
        # The checkpoint that the model came from is not the base of this adapter.
        config["base_model_name_or_path"] = None
        config[PACKED_HASH_KEY] = packed_weights_hash(sorted(_base_weights(model, layers).items()))
    with new_folder(folder, overwrite) as temporary:
        write_safetensors(temporary / TENSOR_FILE, tensors)
        write_json(temporary / CONFIG_FILE, config)
        write_base_identity(temporary, model)
        write_card(temporary, adapter_card(model, config, training), replaced=folder)
        write_labels(temporary, model)


def _layer_tensors(model: nn.Module, layers: Mapping[str, LoraLayer]) -> dict[str, PlannedTensor]:
    """Returns A, B and the variant's other parameters of these layers by peft's keys."""
    tensors: dict[str, PlannedTensor] = {}
    key_names = stack_key_names(model, [name for name, layer in layers.items() if isinstance(layer.kind, StackKind)])
    for name, layer in layers.items():
        shapes = layer.variant.file_shapes(layer.kind, layer.base_layer, ordinary_rank(layer))
        parts = dict(zip(("lora_A", "lora_B"), layer.factors, strict=True))
        for part, tensor in {**layer.lora_parameters, **parts}.items():
            flatten = {"lora_A": flatten_A, "lora_B": flatten_B}[part] if name in key_names else None
            shaped = tensor.detach().view(shapes[part]) if flatten is None else flatten(tensor.detach())
            tensors[peft_key(key_names.get(name, name), layer.kind, part)] = planned(shaped)
    return tensors


def _base_weights(model: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """Returns the base weights of these layers by name, packed or not, whether the layers are adapted or not."""
    modules = {name: model.get_submodule(name) for name in names}
    bases = {name: module.base_layer if isinstance(module, LoraLayer) else module for name, module in modules.items()}
    return {name: base.weight for name, base in bases.items()}


def _check_packed_base_(model: nn.Module, stored: StoredAdapter, folder: Path) -> None:
    """Raises CheckpointError if LoftQ packed the adapter's base again and the model's base is another one.

    Otherwise marks the model's packed weights as not those of its checkpoint. On meta there are no bytes to compare;
    merge_checkpoint compares those on disk.
    """
    if PACKED_HASH_KEY not in stored.options:
        return
    weights = _base_weights(model, stored.layer_tensors)
    if any(weight.device.type == "meta" for weight in weights.values()):
        return
    if not packed_weights_match(str(stored.options[PACKED_HASH_KEY]), weights):
        raise CheckpointError(
            f"{folder} belongs to a base that LoftQ packed again, and the model has another one; {LOAD_REPACKED_HINT}"
        )
    for weight in weights.values():
        weight.of_checkpoint = False


def load_adapter_(
    model: nn.Module, folder: str | Path, *, name: str | None = None, any_base: bool = False
) -> list[str]:
    """Puts an adapter saved here or by peft onto the model and freezes everything else; returns its layers' names.

    If the model has an adapter already, its layers and ranks must be those of the file; its parameters get the file's
    values and stay the same parameters.

    name: adds the adapter to those of the model under this new name, and uses it (multi_adapter.py).
    any_base: accepts a base other than the one the adapter was trained on, as far as the file that save_adapter wrote
        identifies it (base_identity.py; adapters of peft have no such file). Shapes must fit in any case.

    Raises CheckpointError for unknown keys, missing tensors, wrong shapes, NaN, and options that change what is
    computed and are not supported. The model is then unchanged.
    """
    if not any_base:
        check_trained_on_model(Path(folder), model)
    if name is not None:
        with adding_adapter(model, name):
            return _load_(model, Path(folder), name)
    in_use = active_adapter(model)
    if in_use is None:
        check_adapter_name(model, DEFAULT_ADAPTER)
    return _load_(model, Path(folder), in_use or DEFAULT_ADAPTER)


def _load_(model: nn.Module, folder: Path, adapter: str) -> list[str]:
    stored = StoredAdapter.read(model, folder)
    _check_packed_base_(model, stored, folder)
    if stored.auxiliary.modules or stored.auxiliary.rows:
        check_whole(model, "an adapter with modules trained whole or rows of tokens")
    present = bool(lora_layers(model))
    if not present:
        _wrap_layers_(model, stored)
    layers, config = lora_layers(model), stored.config
    for name, layer in layers.items():
        clear_reference_(layer)
        layer.adapter_name = adapter
        layer.alpha, layer.dropout, layer.use_rslora = stored.layers[name].alpha, config.dropout, config.use_rslora
        values = {part: tensor.view(getattr(layer, part).shape) for part, tensor in stored.layer_tensors[name].items()}
        # Parameters on meta cannot be copied into.
        layer.load_state_dict(values, strict=False, assign=layer.lora_A.is_meta)
    stored.auxiliary.put_into_(model, present)
    freeze_base_(model)
    set_labels_of_adapter_(model, folder)
    return list(layers)


def _wrap_layers_(model: nn.Module, stored: StoredAdapter) -> None:
    """Puts a LoraLayer around each layer that the file has A and B for."""

    def make(name: str, module: nn.Module) -> nn.Module | None:
        if name not in stored.layers:
            return None
        return wrap_layer(stored.layers[name], stored.config, stored.layer_tensors[name]["lora_A"].dtype)

    wrap_stacks_(model, {name: layer.module for name, layer in stored.layers.items()})
    replace_modules_(model, make)
