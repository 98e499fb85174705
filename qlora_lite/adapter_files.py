"""Adapters on disk, as peft writes and reads them: `adapter_model.safetensors` and `adapter_config.json`.

peft's keys: `base_model.model.<layer>.lora_A.weight` for linear layers, `….lora_embedding_A` for embeddings; the
shapes are ours.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import hub
from qlora_lite.adapters import adapted, freeze_base_, lora_layers
from qlora_lite.config import ALL_LINEAR, LoraConfig
from qlora_lite.errors import CheckpointError, ConfigError, TargetError
from qlora_lite.layer_kinds import EmbeddingKind, Kind, kind_of
from qlora_lite.lora import LoraLayer
from qlora_lite.modules import answers_to, replace_modules_
from qlora_lite.own_base import DIGEST_KEY, HOW_TO, digest_of, is_base_of, own_weights
from qlora_lite.peft_config import adaptable_names, peft_config
from qlora_lite.storage import PlannedTensor, new_folder, planned, read_json, write_json, write_safetensors
from qlora_lite.tensor_files import read_safetensors

TENSOR_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
# peft stores an adapted embedding's base weight beside the adapter.
BASE_COPY = ".base_layer.weight"
SUFFIXES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
}
Pairs = dict[str, dict[str, Tensor]]
# Options of peft that say what the adapter computes, each with the LoraConfig field that means the same.
NUMBERS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
REQUIRED = ("rank", "alpha")
# Options that say nothing about it: where it came from, how it was started or trained; or that are read apart.
HARMLESS_OPTIONS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_bias",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        DIGEST_KEY,
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_dora",
    }
)
# With one of these, fewer layers are adapted than target_modules says.
NARROWING_OPTIONS = ("exclude_modules", "layers_to_transform", "layers_pattern")
# Initializations that also change the base weight, so that A and B alone are not the adapter.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def peft_key(name: str, kind: Kind, part: str) -> str:
    """peft's key of a layer's matrix; part: A, B or magnitude."""
    if part == "magnitude":
        return f"{PREFIX}{name}.lora_magnitude_vector"
    if isinstance(kind, EmbeddingKind):
        return f"{PREFIX}{name}.lora_embedding_{part}"
    return f"{PREFIX}{name}.lora_{part}.weight"


def save_adapter(model: nn.Module, folder: str | Path, overwrite: bool = False) -> None:
    """Writes A, B, magnitudes and their configuration; `peft.PeftModel.from_pretrained(base, folder)` reads them.

    Ranks and alphas may differ between the layers. Layers whose update is counted from a start (PiSSA) are written as
    ordinary ones of twice the rank, for the plain base. An adapter on a base that LoftQ packed anew names no base and
    carries its SHA-256, by which `load_adapter_` and merges know it again; peft does not look at it. Raises
    CheckpointError for a folder with something in it unless `overwrite`, TargetError without adapters, ConfigError if
    they differ in dropout or rslora.
    """
    layers = lora_layers(model)
    if not layers:
        raise TargetError("the model has no adapters to save; add_lora_ puts them in")
    if "" in layers:
        raise TargetError(
            "the model itself is the adapted layer, which peft's files cannot name; put it into a container"
        )
    tensors: dict[str, PlannedTensor] = {}
    for name, layer in layers.items():
        for part, factor in zip("AB", layer.factors, strict=True):
            tensors[peft_key(name, layer.kind, part)] = planned(factor.detach())
        if layer.lora_magnitude is not None:
            tensors[peft_key(name, layer.kind, "magnitude")] = planned(layer.lora_magnitude)
    config = peft_config(model, layers)
    if own_weights(model):
        # The checkpoint that the model came from is not what this adapter belongs to.
        config["base_model_name_or_path"] = None
        config[DIGEST_KEY] = digest_of(sorted(_base_weights(model, layers).items()))
    with new_folder(Path(folder), overwrite) as temporary:
        write_safetensors(temporary / TENSOR_FILE, tensors)
        write_json(temporary / CONFIG_FILE, config)


def _read_config(path: Path) -> dict[str, Any]:
    """peft's configuration. CheckpointError names every option that changes what is computed and is not known here."""
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} describes a {config.get('peft_type')!r} adapter; only LORA is known")
    set_options = {key for key, value in config.items() if value not in (None, False, "none", "", [], {})}
    unknown = sorted(set_options - HARMLESS_OPTIONS - NUMBERS.keys())
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING_INITS):
        unknown.append(f"init_lora_weights={start!r}")
    if config.get("lora_bias"):
        unknown.append("lora_bias")
    if unknown:
        raise CheckpointError(f"{path} sets {', '.join(unknown)}, which this version cannot honour")
    return config


def _numbers(config: dict[str, Any], path: Path) -> LoraConfig:
    """Rank, alpha and all else that decides what A and B compute; which layers have them, their keys say."""
    given: dict[str, Any] = {field: config.get(option) for option, field in NUMBERS.items()}
    given["variant"] = "dora" if config.get("use_dora") else "lora"
    try:
        return LoraConfig(**{field: value for field, value in given.items() if value is not None or field in REQUIRED})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _pairs(tensors: dict[str, Tensor], path: Path) -> Pairs:
    """{layer: {"lora_A": …, "lora_B": …}}; CheckpointError lists foreign keys and layers without one pair."""
    pairs: Pairs = {}
    foreign = []
    for key, tensor in tensors.items():
        if key.startswith(PREFIX) and key.endswith(BASE_COPY):
            continue
        suffix = next((suffix for suffix in SUFFIXES if key.endswith("." + suffix)), None)
        name = "" if suffix is None else key[len(PREFIX) : -len(suffix) - 1]
        if suffix is None or not key.startswith(PREFIX) or SUFFIXES[suffix] in pairs.get(name, {}):
            foreign.append(key)
            continue
        pairs.setdefault(name, {})[SUFFIXES[suffix]] = tensor
    if foreign:
        shown = ", ".join(sorted(foreign)[:8])
        raise CheckpointError(f"{path} has keys that belong to no adapter, or to one that is there already: {shown}")
    if single := sorted(name for name, pair in pairs.items() if not {"lora_A", "lora_B"} <= pair.keys()):
        raise CheckpointError(f"{path} has only one of A and B for: {', '.join(single[:8])}")
    if not pairs:
        raise CheckpointError(f"{path} is empty")
    return pairs


def _mismatches(model: nn.Module, pairs: Pairs, numbers: LoraConfig, keys: Collection[str]) -> list[str]:
    modules = dict(model.named_modules())
    problems = []
    for name, pair in pairs.items():
        module = modules.get(name)
        base = module.base_layer if isinstance(module, LoraLayer) else module
        kind = kind_of(base) if base is not None else None
        if kind is None:
            problems.append(f"{name} is no layer of this model that can be adapted")
            continue
        if lost := [key for part in "AB" if (key := peft_key(name, kind, part)) not in keys]:
            problems.append(f"{name} is another kind of layer here: {' and '.join(lost)} should be in the file")
            continue
        if ("lora_magnitude" in pair) != (numbers.variant == "dora"):
            problems.append(f"{name} has {'no ' * (len(pair) < 3)}magnitudes and use_dora says otherwise")
            continue
        if isinstance(module, LoraLayer) and module.variant != numbers.variant:
            problems.append(f"{name} has a {module.variant} adapter, the file a {numbers.variant} one")
            continue
        width, height = kind.features(base)
        rank = numbers.rank_of(name)
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (rank, width), "lora_B": (height, rank)}
        shapes["lora_magnitude"] = (height,)
        for part, tensor in pair.items():
            if tuple(tensor.shape) != shapes[part]:
                problems.append(f"{name}.{part} is {tuple(tensor.shape)}, the layer needs {shapes[part]}")
            elif not tensor.is_floating_point():
                problems.append(f"{name}.{part} is of {tensor.dtype}, which is no float")
            elif isinstance(module, LoraLayer) and getattr(module, part).shape != tensor.shape:
                problems.append(f"{name} has an adapter of rank {module.rank} already; remove_lora_ drops it")
            elif not tensor.isfinite().all():
                problems.append(f"{name}.{part} holds NaN or infinity")
    return problems


def _left_out(model: nn.Module, pairs: Collection[str], config: dict[str, Any]) -> list[str]:
    """What the configuration targets and the file has nothing for: part of the adapter is lost."""
    targets = config.get("target_modules")
    if targets in (None, ALL_LINEAR) or any(config.get(option) for option in NARROWING_OPTIONS):
        return []
    layers = adaptable_names(model)
    if isinstance(targets, str):
        try:
            meant = {name for name in layers if re.fullmatch(targets, name)}
            if not meant.intersection(pairs):
                return [f"target_modules {targets!r} matches no layer in the file"]
        except re.error as error:
            return [f"target_modules {targets!r} is not a regular expression: {error}"]
    elif isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        unmet = [t for t in targets if not any(answers_to(n, t) for n in pairs)]
        # peft keeps targets that other models have, as long as this one has some.
        if lost := [t for t in unmet if unmet == targets or any(answers_to(n, t) for n, _ in model.named_modules())]:
            return [f"target_modules {lost} answer to no layer in the file"]
        meant = {name for name in layers if any(answers_to(name, target) for target in targets)}
    else:
        return [f"target_modules must be a list of names or a regular expression; got {targets!r}"]
    missing = sorted(meant - set(pairs))
    shown = ", ".join(missing[:4]) + (" …" if len(missing) > 4 else "")
    return [f"{len(missing)} targeted layers have nothing in the file: {shown}"] if missing else []


def _other_bases(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Base weights that came with the adapter and are not this model's: the adapter was trained on something else."""
    modules = dict(model.named_modules())
    problems = []
    for key, tensor in tensors.items():
        if not key.endswith(BASE_COPY):
            continue
        name = key[len(PREFIX) : -len(BASE_COPY)]
        module = modules.get(name)
        base = module.base_layer if isinstance(module, LoraLayer) else module
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
    for alias, source in hub.tied_pairs(model):
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
    weights = {} if DIGEST_KEY not in config else _base_weights(model, names)
    if any(weight.device.type == "meta" for weight in weights.values()):
        return
    if weights and not is_base_of(config[DIGEST_KEY], weights):
        raise CheckpointError(f"{folder} belongs to a base that LoftQ packed anew, and the model has another; {HOW_TO}")
    for weight in weights.values():
        weight.of_checkpoint = False


def load_adapter_(model: nn.Module, folder: str | Path) -> list[str]:
    """Puts an adapter saved here or by peft onto the model, freezes all else, returns the adapted layers' names.

    All or nothing: a key that matches nothing, a missing partner, a wrong shape, NaN, or an option that changes the
    mathematics and is not known raises CheckpointError before the model is touched. Layers that are adapted already
    must be exactly those in the file, of its ranks; their parameters get its values, and stay the same parameters.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    numbers = _numbers(config, folder / CONFIG_FILE)
    tensors = read_safetensors(folder / TENSOR_FILE)
    pairs = _pairs(tensors, folder / TENSOR_FILE)
    problems = [
        *_mismatches(model, pairs, numbers, tensors.keys()),
        *_other_bases(model, tensors),
        *numbers.idle_patterns(pairs),
    ]
    problems += _left_out(model, pairs, config)
    if config.get("ensure_weight_tying"):
        problems += _apart(model, pairs)
    present = set(lora_layers(model))
    if present and present != set(pairs):
        problems.append(f"the model has adapters on other layers ({len(present)} there, {len(pairs)} in the file)")
    if problems:
        shown = "; ".join(problems[:8]) + (f" and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{folder} does not fit this model: {shown}")
    _check_own_base_(model, pairs, config, folder)

    def make(name: str, base: nn.Module) -> nn.Module | None:
        if name not in pairs or present:
            return None
        return adapted(name, base, numbers, pairs[name]["lora_A"].dtype)

    replace_modules_(model, make)
    layers = lora_layers(model)
    for name, layer in layers.items():
        layer.drop_start()
        layer.alpha, layer.dropout, layer.rslora = numbers.alpha_of(name), numbers.dropout, numbers.rslora
        # On meta there is nothing to copy into.
        layer.load_state_dict(pairs[name], strict=False, assign=layer.lora_A.is_meta)
    freeze_base_(model)
    return list(layers)
