"""The options in adapter_config.json: read as a LoraConfig, ignored, or refused.

An option that changes what the adapter computes, or that comes with tensors of its own, must be understood or refused.
An option that only says where the adapter came from or how it was trained is ignored. Every option that is neither read
nor ignored is refused if it is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_lite.checkpoints.files import read_json
from qlora_lite.errors import CheckpointError, ConfigError, listing
from qlora_lite.lora.config import LoraConfig
from qlora_lite.lora.peft.keys import PREFIX, adapter_tensors
from qlora_lite.lora.variants import PEFT_OPTIONS, check_bias, variant_of
from qlora_lite.tasks import TASKS, Task

CONFIG_FILE = "adapter_config.json"
# The names of a classifier's labels, for which peft's files have no place.
LABELS_FILE = "labels.json"
# Options that decide what A and B compute, each with the LoraConfig field of the same meaning.
LORA_CONFIG_FIELDS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
# The values that every release of peft takes for numbers that are missing.
PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8}
# Options that do not change what the adapter computes (its origin, initialization and training), and options that
# other functions read.
IGNORED_OPTIONS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
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
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "merge_weights",  # peft 0.2: whether eval() merged
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "velora_config",  # changes the backward pass only
    }
)
# Written by this package and ignored by peft: the packed base that the adapter belongs to (base_identity.py).
OWN_OPTIONS = frozenset({"packed_base_sha256"})
# Initializations that change the base weight too, so that A and B alone are not the adapter.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
UNSET: tuple[object, ...] = (None, False, "none", "", [], {})


def read_peft_config(path: Path) -> dict[str, object]:
    """Reads an adapter_config.json. Raises CheckpointError if it does not describe a LoRA adapter."""
    if not path.exists() and (inner := sorted(found.parent for found in path.parent.glob(f"*/{path.name}"))):
        raise CheckpointError(f"{path.parent} has no {path.name}; name an adapter in it: {listing(inner, 4)}")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} describes a {config.get('peft_type')!r} adapter; only LORA is supported")
    return config


def read_supported_config(path: Path) -> dict[str, object]:
    """Reads an adapter_config.json. Raises CheckpointError that names every option set in it that is not supported."""
    config = read_peft_config(path)
    if refused := refused_options(config):
        raise CheckpointError(f"{path} sets {', '.join(refused)}, which this version does not support")
    return config


def lora_config(config: Mapping[str, object], path: Path) -> LoraConfig:
    """Returns the options that decide what A and B compute, as a LoraConfig.

    target_modules keeps its default: the keys of the tensors name the adapted layers. Raises CheckpointError for values
    that no LoRA layer can have; path: the file that the error names.
    """
    config = {**PEFT_DEFAULTS, **config}
    given: dict[str, Any] = {field: config.get(option) for option, field in LORA_CONFIG_FIELDS.items()}
    required = [LORA_CONFIG_FIELDS[option] for option in PEFT_DEFAULTS]
    try:
        variant = variant_of(config)
        check_bias(variant, config.get("bias") or "none")
        given["variant"] = variant.name
        return LoraConfig(**{field: value for field, value in given.items() if value is not None or field in required})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def target_parameters(config: Mapping[str, object], path: Path) -> list[str]:
    """Returns the names in target_parameters. Raises CheckpointError if it is not a list of names."""
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{path}: target_parameters must be a list of names; got {targets!r}")
    return targets


def base_changing_init(config: Mapping[str, object]) -> str | None:
    """Returns init_lora_weights if it names an initialization that changes the base weight too, else None."""
    init = config.get("init_lora_weights")
    return init if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS) else None


def refused_options(config: Mapping[str, object]) -> list[str]:
    """Returns the names of the options that are set and not supported, unknown ones included."""
    known = IGNORED_OPTIONS | OWN_OPTIONS | LORA_CONFIG_FIELDS.keys() | PEFT_OPTIONS.keys()
    refused = sorted(key for key, value in config.items() if value not in UNSET and key not in known)
    init = base_changing_init(config)
    return refused if init is None else [*refused, f"init_lora_weights={init!r}"]


def task_of_type(peft_type: object) -> Task | None:
    """Returns the task with labels that peft calls so, None if there is none."""
    return next((task for task in TASKS.values() if task.has_labels and task.peft_type == peft_type), None)


def adapter_task(folder: Path) -> Task | None:
    """Returns the task of an adapter with a head of labels; None for any other adapter."""
    return task_of_type(read_json(folder / CONFIG_FILE).get("task_type"))


def read_labels(folder: Path) -> dict[str, Any] | None:
    """Returns the content of `labels.json`, None if there is none. Raises CheckpointError for one that is damaged."""
    path = folder / LABELS_FILE
    if not path.is_file():
        return None
    found = read_json(path)
    names = found.get("id2label")
    is_good = isinstance(names, dict) and names and all(isinstance(name, str) for name in names.values())
    if not is_good or list(names) != [str(number) for number in range(len(names))]:  # type: ignore[arg-type]
        raise CheckpointError(f"{path} should have names by their numbers from 0 under id2label; got {names!r}")
    return found


def labels_of_adapter(folder: Path) -> list[str] | int:
    """Returns the names of the labels of an adapter; of one without `labels.json`, their number, from its head."""
    found = read_labels(folder)
    if found is not None:
        return list(found["id2label"].values())
    heads = [
        stored.shape[0]
        for key, stored in adapter_tensors(folder).items()
        if key.startswith(PREFIX) and key.endswith("weight") and "lora_" not in key and len(stored.shape) == 2
    ]
    if not heads:
        raise CheckpointError(f"{folder} is an adapter of a classifier, and its file has no head of labels")
    return min(heads)
