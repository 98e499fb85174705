"""The options of peft's LoraConfig, and of its older releases, by what they are to an adapter that is read here.

Every one is in one of three classes: read, of no matter to what A and B compute, or refused where it is set.
"""

from __future__ import annotations

from typing import Any

# Options that say what the adapter computes, each with the LoraConfig field that means the same.
NUMBERS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
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
        "use_dora",
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


def base_changing_init(config: dict[str, Any]) -> str | None:
    """`init_lora_weights` if it is one that changes the base weight too."""
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower().startswith(BASE_CHANGING_INITS) else None


def refused_options(config: dict[str, Any]) -> list[str]:
    """Names of the options that are set and not known to be harmless, unknown ones included."""
    known = HARMLESS_OPTIONS | OWN_OPTIONS | NUMBERS.keys()
    refused = sorted(key for key, value in config.items() if value not in NOT_SET and key not in known)
    start = base_changing_init(config)
    return refused if start is None else [*refused, f"init_lora_weights={start!r}"]
