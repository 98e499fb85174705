"""Adapters on disk, as peft writes and reads them: `adapter_model.safetensors` and `adapter_config.json`.

The shapes in them are ours, but those of convolutions are kernels' and those of stacks are flat (experts.py). With
groups peft has an A of another meaning (convolution.py): neither loads the other's, and both say so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints.atomic_folder import new_folder
from qlora_lite.checkpoints.base_identity import (
    LOAD_REPACKED_HINT,
    PACKED_HASH_KEY,
    check_trained_on_model,
    packed_weights_hash,
    packed_weights_match,
    repacked_weights,
    write_base_identity,
)
from qlora_lite.checkpoints.files import write_json
from qlora_lite.checkpoints.safetensors_write import PlannedTensor, planned, write_safetensors
from qlora_lite.errors import CheckpointError, ConfigError, TargetError, listing
from qlora_lite.lora.adapters import adapted, check_name, freeze_base_, lora_layers
from qlora_lite.lora.auxiliary_layers import WithTokenRows
from qlora_lite.lora.config import LoraConfig
from qlora_lite.lora.convolution import read_kernels
from qlora_lite.lora.experts import hold_stacks_, kinds_of, open_stacks, patterned_name, stacks_among
from qlora_lite.lora.kinds import EmbeddingKind, Kind, kind_of
from qlora_lite.lora.layer import DEFAULT_ADAPTER, LoraLayer
from qlora_lite.lora.multi_adapter import active_adapter, adapter_layers, room_for
from qlora_lite.lora.peft.auxiliary import StoredBeside, beside_config, beside_keys
from qlora_lite.lora.peft.config_json import peft_config, target_problems
from qlora_lite.lora.peft.experts import flat_A, flat_B, places_in_files, stack_pairs, targeted_parameters
from qlora_lite.lora.peft.keys import (
    BASE_COPY,
    CONFIG_FILE,
    NUMBERS,
    PREFIX,
    TENSOR_FILE,
    TOKEN_ADAPTER,
    adapter_tensors,
    layer_and_part,
    read_peft_config,
    refused_options,
)
from qlora_lite.lora.variants import (
    EXTRA_PARAMETERS,
    VARIANTS,
    clear_reference_,
    combination_problems,
    ordinary_rank,
    variant_contradictions,
    variant_of,
)
from qlora_lite.surgery import replace_modules_

Pairs = dict[str, dict[str, Tensor]]
# What every release of peft takes for a number that is not in the file.
PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8}

GROUPED = " (an A that reads the inputs of all groups, as peft's does, is no update of a grouped convolution's kernel)"


def peft_key(name: str, kind: Kind, part: str) -> str:
    """Returns peft's key of a parameter of a layer; part: its name on a LoraLayer."""
    if part in EXTRA_PARAMETERS:
        return f"{PREFIX}{name}.{EXTRA_PARAMETERS[part].peft_key}"
    if isinstance(kind, EmbeddingKind):
        return f"{PREFIX}{name}.{part.replace('lora_', 'lora_embedding_')}"
    return f"{PREFIX}{name}.{part}.weight"


def save_adapter(model: nn.Module, folder: str | Path, overwrite: bool = False, *, name: str | None = None) -> None:
    """Writes A, B, the variant's other parameters, what is trained beside them, and their configuration.

    `peft.PeftModel.from_pretrained(base, folder)` reads them. Beside them lies what their base is (base_identity.py).

    Ranks and alphas may differ between the layers. Layers whose update is counted from a start (PiSSA) are written as
    ordinary ones of twice the rank, for the plain base. An adapter on a base that LoftQ packed anew names no base and
    carries its SHA-256, by which `load_adapter_` and merges know it again; peft does not look at it. Raises
    CheckpointError for a folder with something in it unless `overwrite`, TargetError without adapters, ConfigError if
    they differ in dropout or use_rslora.
    name: of several adapters (multi_adapter.py), in use or not; None: the one in use.
    """
    with adapter_layers(model, name) as layers:
        _save(model, layers, Path(folder), overwrite, in_use=name in (None, active_adapter(model)))


def _save(model: nn.Module, layers: dict[str, LoraLayer], folder: Path, overwrite: bool, in_use: bool) -> None:
    if not layers:
        raise TargetError("the model has no adapters to save, or none in use; add_lora_ puts them in")
    if "" in layers:
        raise TargetError(
            "the model itself is the adapted layer, which peft's files cannot name; put it into a container"
        )
    tensors: dict[str, PlannedTensor] = {}
    places = places_in_files(model, stacks_among(layers))
    for name, layer in layers.items():
        shapes = layer.variant.file_shapes(layer.kind, layer.base_layer, ordinary_rank(layer))
        parts = dict(zip(("lora_A", "lora_B"), layer.factors, strict=True))
        for part, tensor in {**layer.lora_parameters, **parts}.items():
            flat = {"lora_A": flat_A, "lora_B": flat_B}[part] if name in places else None
            shaped = tensor.detach().view(shapes[part]) if flat is None else flat(tensor.detach())
            tensors[peft_key(places.get(name, name), layer.kind, part)] = planned(shaped)
    config = {"bias": "none"} | peft_config(model, layers)
    if in_use:  # what is trained beside it is its own
        tensors |= {key: planned(values.detach()) for key, _, values in beside_keys(model)}
        config |= beside_config(model)
    if repacked_weights(model):
        # The checkpoint that the model came from is not what this adapter belongs to.
        config["base_model_name_or_path"] = None
        config[PACKED_HASH_KEY] = packed_weights_hash(sorted(_base_weights(model, layers).items()))
    with new_folder(folder, overwrite) as temporary:
        write_safetensors(temporary / TENSOR_FILE, tensors)
        write_json(temporary / CONFIG_FILE, config)
        write_base_identity(temporary, model)


def _read_config(path: Path) -> dict[str, Any]:
    """peft's configuration. CheckpointError names every option that changes what is computed and is not known here."""
    config = read_peft_config(path)
    if refused := refused_options(config):
        raise CheckpointError(f"{path} sets {', '.join(refused)}, which this version cannot honour")
    return config


def lora_numbers(config: dict[str, Any], path: Path) -> LoraConfig:
    """Rank, alpha and all else that decides what A and B compute; which layers have them, their keys say."""
    config = {**PEFT_DEFAULTS, **config}
    given: dict[str, Any] = {field: config.get(option) for option, field in NUMBERS.items()}
    required = [NUMBERS[option] for option in PEFT_DEFAULTS]
    try:
        given["variant"] = variant_of(config).name
        return LoraConfig(**{field: value for field, value in given.items() if value is not None or field in required})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _adapted_names(tensors: Collection[str]) -> set[str]:
    """The layers that have an A."""
    return {at[0] for key in tensors if (at := layer_and_part(key)) is not None and at[1] == "lora_A"}


def _pairs(tensors: dict[str, Tensor], path: Path) -> Pairs:
    """{layer: {"lora_A": …, "lora_B": …}}; CheckpointError lists foreign keys and layers without one pair."""
    pairs: Pairs = {}
    foreign = []
    for key, tensor in tensors.items():
        if key.startswith(PREFIX) and key.endswith(BASE_COPY):
            continue
        name, part = layer_and_part(key) or ("", "")
        if not part or part in pairs.get(name, {}):
            foreign.append(key)
            continue
        pairs.setdefault(name, {})[part] = tensor
    if foreign:
        shown = listing(sorted(foreign))
        raise CheckpointError(f"{path} has keys that belong to no adapter, or to one that is there already: {shown}")
    if single := sorted(name for name, pair in pairs.items() if not {"lora_A", "lora_B"} <= pair.keys()):
        raise CheckpointError(f"{path} has only one of A and B for: {listing(single)}")
    if not pairs:
        raise CheckpointError(f"{path} is empty")
    return pairs


def _mismatches(
    modules: Mapping[str, nn.Module],
    pairs: Pairs,
    numbers: LoraConfig,
    keys: Collection[str],
    places: Mapping[str, str],
) -> list[str]:
    problems, variant = [], VARIANTS[numbers.variant]
    for name, pair in pairs.items():
        module = modules.get(name)
        base: Any = module.base_layer if isinstance(module, LoraLayer) else module
        kind = kind_of(base) if base is not None else None
        if kind is None:
            problems.append(f"{name} is no layer of this model that can be adapted")
            continue
        place = places.get(name, name)
        if lost := [key for part in ("lora_A", "lora_B") if (key := peft_key(place, kind, part)) not in keys]:
            problems.append(f"{name} is another kind of layer here: {' and '.join(lost)} should be in the file")
            continue
        if contradictions := variant_contradictions(pair, variant):
            problems += [f"{name} {contradiction}" for contradiction in contradictions]
            continue
        if isinstance(module, LoraLayer) and module.variant is not variant:
            problems.append(f"{name} has a {module.variant.name} adapter, the file a {variant.name} one")
            continue
        grouped = "" if getattr(base, "groups", 1) == 1 else GROUPED
        shapes = variant.file_shapes(kind, base, numbers.rank_of(patterned_name(name, base)))
        for part, tensor in pair.items():
            if tuple(tensor.shape) != shapes[part]:
                problems.append(f"{name}.{part} is {tuple(tensor.shape)}, the layer needs {shapes[part]}{grouped}")
            elif not tensor.is_floating_point():
                problems.append(f"{name}.{part} is of {tensor.dtype}, which is no float")
            elif isinstance(module, LoraLayer) and getattr(module, part).numel() != tensor.numel():
                problems.append(f"{name} has an adapter of rank {module.rank} already; remove_lora_ drops it")
            elif not tensor.isfinite().all():
                problems.append(f"{name}.{part} holds NaN or infinity")
    return problems


def _other_bases(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Base weights that came with the adapter and are not this model's: the adapter was trained on something else."""
    modules = dict(model.named_modules())
    problems = []
    for key, tensor in tensors.items():
        if not key.endswith(BASE_COPY):
            continue
        name = key[len(PREFIX) : -len(BASE_COPY)].removesuffix(TOKEN_ADAPTER)
        module = modules.get(name)
        base = module.base_layer if isinstance(module, (LoraLayer, WithTokenRows)) else module
        weight = getattr(base, "weight", None)
        if weight is None or weight.shape != tensor.shape:
            problems.append(f"{name} comes with a base weight {tuple(tensor.shape)} that fits no layer of the model")
        elif isinstance(weight, Tensor) and not weight.is_meta and not torch.equal(weight, tensor.to(weight)):
            problems.append(f"{name} comes with a base weight that differs from the model's")
    return problems


def _base_weights(model: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """The bases' weights of layers, adapted or not yet, by their names."""
    modules = {name: model.get_submodule(name) for name in names}
    return {n: (m.base_layer if isinstance(m, LoraLayer) else m).weight for n, m in modules.items()}


def _apart(model: nn.Module, pairs: Pairs) -> list[str]:
    """Tied layers without a common A and B. peft's ensure_weight_tying has them be one: a head's are B^T and A^T."""
    problems = []
    for alias, source in architecture.tied_pairs(model):
        head, embedding = pairs.get(alias.removesuffix(".weight"), {}), pairs.get(source.removesuffix(".weight"), {})
        turned = {"lora_A": embedding.get("lora_B"), "lora_B": embedding.get("lora_A")}
        known = {part: tensor.T.float() for part, tensor in turned.items() if tensor is not None}
        if head.keys() != known.keys() or any(not torch.equal(head[part].float(), known[part]) for part in known):
            problems.append(f"ensure_weight_tying is set, and {alias} and {source} have not the same adapter")
    return problems


def _check_own_base_(model: nn.Module, names: Collection[str], config: dict[str, Any], folder: Path) -> None:
    """CheckpointError if LoftQ packed the adapter's base anew and the model has another; else notes that on its base.

    On meta there are no bytes to compare: merge_checkpoint does it with those on disk.
    """
    weights = {} if PACKED_HASH_KEY not in config else _base_weights(model, names)
    if any(weight.device.type == "meta" for weight in weights.values()):
        return
    if weights and not packed_weights_match(config[PACKED_HASH_KEY], weights):
        raise CheckpointError(
            f"{folder} belongs to a base that LoftQ packed anew, and the model has another; {LOAD_REPACKED_HINT}"
        )
    for weight in weights.values():
        weight.of_checkpoint = False


def load_adapter_(
    model: nn.Module, folder: str | Path, *, name: str | None = None, any_base: bool = False
) -> list[str]:
    """Puts an adapter saved here or by peft onto the model, freezes all else, returns the adapted layers' names.

    All or nothing: a key that matches nothing, a missing partner, a wrong shape, NaN, or an option that changes the
    mathematics and is not known raises CheckpointError before the model is touched. Layers that are adapted already
    must be exactly those in the file, of its ranks; their parameters get its values, and stay the same parameters.
    name: puts it beside the adapters that are there, under a new name, and uses it (multi_adapter.py).
    any_base: whether its base may be another one than it was trained on, by what lies beside it (base_file.py; peft's
    adapters have nothing there). Shapes are held against the model's all the same.
    """
    if not any_base:
        check_trained_on_model(Path(folder), model)
    if name is not None:
        with room_for(model, name):
            return _load_(model, Path(folder), name)
    used = active_adapter(model)
    if used is None:
        check_name(model, DEFAULT_ADAPTER)
    return _load_(model, Path(folder), used or DEFAULT_ADAPTER)


def _load_(model: nn.Module, folder: Path, adapter: str) -> list[str]:
    config = _read_config(folder / CONFIG_FILE)
    numbers = lora_numbers(config, folder / CONFIG_FILE)
    tensors = {key: stored.read() for key, stored in adapter_tensors(folder).items()}
    beside = StoredBeside.taken(model, tensors, config, _adapted_names(tensors))
    by_parameter = targeted_parameters(model, config, folder / CONFIG_FILE)
    modules = dict(model.named_modules()) | open_stacks(model)
    meant = {name: modules[name] for name in by_parameter}
    places = places_in_files(model, stacks_among(meant))
    pairs = stack_pairs(modules, _pairs(tensors, folder / TENSOR_FILE), places)
    called = {name: patterned_name(name, modules[name]) if name in modules else name for name in pairs}
    problems = [
        *beside.problems,
        *_mismatches(modules, pairs, numbers, tensors.keys(), places),
        *_other_bases(model, tensors),
        *numbers.idle_patterns(called.values()),
        *read_kernels(model, [name for name in pairs if name not in places]),
    ]
    problems += target_problems(model, pairs.keys() - meant.keys(), config)
    problems += [f"{name} is targeted and has nothing in the file" for name in meant if name not in pairs]
    chosen = {name: modules[name] for name in {*pairs, *meant} if name in modules}
    problems += combination_problems(kinds_of(chosen), numbers.dropout, VARIANTS[numbers.variant])
    if config.get("ensure_weight_tying"):
        problems += _apart(model, pairs)
    present = set(lora_layers(model))
    if present and present != set(pairs):
        problems.append(f"the model has adapters on other layers ({len(present)} there, {len(pairs)} in the file)")
    problems += beside.differences(model) if present and not problems else []
    if problems:
        shown = listing(problems, separator="; ")
        raise CheckpointError(f"{folder} does not fit this model: {shown}")
    _check_own_base_(model, pairs, config, folder)

    def make(name: str, base: nn.Module) -> nn.Module | None:
        if name not in pairs or present:
            return None
        return adapted(called[name], base, numbers, pairs[name]["lora_A"].dtype)

    if not present:
        hold_stacks_(model, places)
    replace_modules_(model, make)
    layers = lora_layers(model)
    for name, layer in layers.items():
        clear_reference_(layer)
        layer.adapter_name = adapter
        layer.alpha, layer.dropout, layer.use_rslora = (
            numbers.alpha_of(called[name]),
            numbers.dropout,
            numbers.use_rslora,
        )
        # On meta there is nothing to copy into.
        values = {part: tensor.view(getattr(layer, part).shape) for part, tensor in pairs[name].items()}
        layer.load_state_dict(values, strict=False, assign=layer.lora_A.is_meta)
    beside.put_(model, bool(present))
    freeze_base_(model)
    return list(layers)
