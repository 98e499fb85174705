"""The two files of an adapter, as any release of peft wrote them, under the keys that today's writes.

`base_model.model.<layer>.lora_A.weight` and `.lora_B.weight` for linear layers, `….lora_embedding_A` and `_B` for
embeddings, `….base_layer.weight` for the base weight of an adapted embedding; variants of LoRA have other keys in
addition (variants.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qlora_lite.checkpoints.files import read_json
from qlora_lite.checkpoints.safetensors_read import StoredTensor, stored_tensors
from qlora_lite.errors import CheckpointError
from qlora_lite.lora.variants import EXTRA_PARAMETERS, PEFT_OPTIONS

TENSOR_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
# peft stores an adapted embedding's base weight beside the adapter.
BASE_COPY = ".base_layer.weight"
# What stands between an embedding and that, if rows of it are trained.
TOKEN_ADAPTER = ".token_adapter"
SUFFIXES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    **{extra.peft_key: name for name, extra in EXTRA_PARAMETERS.items()},
}
# Of a model's own state_dict, which some training programs write: peft itself takes its adapter's name out.
NAMED_ADAPTER = re.compile(r"(\.lora_\w+)\.default(?=\.|$)")
OLDER_SUFFIXES = {older: extra.peft_key for extra in EXTRA_PARAMETERS.values() for older in extra.older_peft_keys}

# Options that say what the adapter computes, each with the LoraConfig field that means the same.
NUMBERS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
# Options that say nothing about it: where it came from, how it was started or trained; or that are read apart.
HARMLESS_OPTIONS = frozenset(
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
        "velora_config",  # another backward pass, the same forward
    }
)
# Ours, which peft passes over: what the adapter stands on (base_identity.py).
OWN_OPTIONS = frozenset({"packed_base_sha256"})
# Options that change what is computed, or that come with tensors of their own.
REFUSED_OPTIONS = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "enable_lora",  # peft 0.2: A and B for some thirds of a joined projection only
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "monteclora_config",
        "use_bdlora",
        "use_qalora",
    }
)
# Initializations that also change the base weight, so that A and B alone are not the adapter.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
NOT_SET: tuple[Any, ...] = (None, False, "none", "", [], {})


def todays_key(key: str) -> str:
    """The key that today's peft writes for this tensor.

    Without the adapter's name (`lora_A.default.weight`); with the prefix, which transformers' own loading of adapters
    does without; and a variant's other parameters as today's peft names them.
    """
    key = NAMED_ADAPTER.sub(r"\1", key)
    for older, today in OLDER_SUFFIXES.items():
        if key.endswith("." + older):
            key = key.removesuffix(older) + today
    return key if key.startswith(PREFIX) else PREFIX + key


def layer_and_part(key: str) -> tuple[str, str] | None:
    """(layer, the name of a LoraLayer's parameter) of one of today's keys; None for a key of something else."""
    suffix = next((suffix for suffix in SUFFIXES if key.endswith("." + suffix)), None)
    if suffix is None or not key.startswith(PREFIX):
        return None
    return key[len(PREFIX) : -len(suffix) - 1], SUFFIXES[suffix]


def read_peft_config(path: Path) -> dict[str, Any]:
    """An adapter's configuration. CheckpointError for one that is not of a LoRA."""
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} describes a {config.get('peft_type')!r} adapter; only LORA is known")
    return config


def parameter_targets(config: dict[str, Any], path: Path) -> list[str]:
    """The names in target_parameters. CheckpointError for anything that is no list of names."""
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{path}: target_parameters must be a list of names; got {targets!r}")
    return targets


def written_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of an adapter under the keys that its file has. CheckpointError for a file that is no safetensors."""
    path = folder / TENSOR_FILE
    if not path.is_file() and (folder / PICKLED_FILE).is_file():
        raise CheckpointError(
            f"{folder / PICKLED_FILE} is a pickle, which can run any code and is never opened here; if you trust it, "
            f"let peft write it anew: PeftModel.from_pretrained(base, folder).save_pretrained(folder)"
        )
    return stored_tensors(path)


def adapter_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of an adapter under today's keys. CheckpointError for a file with two that come to the same key."""
    found: dict[str, StoredTensor] = {}
    written = written_tensors(folder)
    adapted = {PREFIX + at[0] for key in written if (at := layer_and_part(todays_key(key))) is not None}
    for key, tensor in written.items():
        today = todays_key(key)
        # peft 0.6 had an adapted embedding be an embedding: its base weight is under the layer's own name.
        if today.removesuffix(".weight") in adapted:
            today = today.removesuffix(".weight") + BASE_COPY
        if today in found:
            raise CheckpointError(f"{folder / TENSOR_FILE} has {today} twice, as {found[today].name} and as {key}")
        found[today] = tensor
    return found


def base_changing_init(config: dict[str, Any]) -> str | None:
    """`init_lora_weights` if it is one that changes the base weight too."""
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower().startswith(BASE_CHANGING_INITS) else None


def refused_options(config: dict[str, Any]) -> list[str]:
    """Names of the options that are set and not known to be harmless, unknown ones included."""
    known = HARMLESS_OPTIONS | OWN_OPTIONS | NUMBERS.keys() | PEFT_OPTIONS.keys()
    refused = sorted(key for key, value in config.items() if value not in NOT_SET and key not in known)
    start = base_changing_init(config)
    return refused if start is None else [*refused, f"init_lora_weights={start!r}"]
