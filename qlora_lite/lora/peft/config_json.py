"""Writes adapter_config.json: the values that most adapted layers have, and patterns for the layers that differ.

Beside it, labels.json has the names of a classifier's labels, for which peft's files have no place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qlora_lite import architecture
from qlora_lite.checkpoints.files import write_json
from qlora_lite.checkpoints.repository.download import hub_id
from qlora_lite.errors import ConfigError
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.lora.peft.options import LABELS_FILE, read_labels
from qlora_lite.lora.targets import TargetedLayer, adaptable_names
from qlora_lite.lora.variants import VARIANTS, peft_options
from qlora_lite.surgery import name_matches, names_not_loaded
from qlora_lite.tasks import label_head, task_of


def _common_endings(names: Iterable[str], model: nn.Module) -> list[str] | None:
    """Returns the last parts of these names if they select exactly these layers, else None."""
    names = set(names)
    endings = sorted({name.rpartition(".")[2] for name in names})
    known = adaptable_names(model) | names_not_loaded(model)
    selected = {name for name in known if any(name_matches(name, ending) for ending in endings)}
    return endings if selected == names else None


def peft_target_modules(names: Iterable[str], model: nn.Module) -> list[str] | str:
    """Returns target_modules for exactly these layers: last parts of names, whole names, or a regular expression.

    peft applies a name to every module that ends with it, including modules that cannot be adapted, or are not loaded.
    """
    wanted = set(names)
    modules = {name for name, _ in model.named_modules() if "base_layer" not in name.split(".")}
    modules |= names_not_loaded(model)
    for listed in (sorted({name.rpartition(".")[2] for name in wanted}), sorted(wanted)):
        if {name for name in modules if any(name_matches(name, target) for target in listed)} == wanted:
            return listed
    return "|".join(map(re.escape, sorted(wanted)))


def _router_weights(names: Collection[str], model: nn.Module) -> list[str]:
    """Returns target_parameters for the weights of these routers: common endings, if no other weight matches them."""
    endings = sorted({f"{name.rpartition('.')[2]}.weight" for name in names})
    weights = [f"{name}.weight" for name, _ in model.named_modules() if not name.endswith(".base_layer")]
    selected = [weight for weight in weights if any(name_matches(weight, ending) for ending in endings)]
    return endings if len(selected) == len(names) else sorted(f"{name}.weight" for name in names)


def _usual_and_patterns(numbers: Mapping[str, float], model: nn.Module) -> tuple[float, dict[str, float]]:
    """Returns the number that most layers have, and patterns for the others.

    No layer matches two patterns with different numbers: peft sorts patterns when it saves, and the first match counts.
    """
    ((usual, _),) = Counter(numbers.values()).most_common(1)
    patterns: dict[str, float] = {}
    for number in sorted(set(numbers.values()) - {usual}):
        names = [name for name, value in numbers.items() if value == number]
        endings = _common_endings(names, model)
        for pattern in [f"^{re.escape(name)}" for name in names] if endings is None else map(re.escape, endings):
            patterns[pattern] = number
    return usual, patterns


def peft_config(model: nn.Module, layers: Mapping[str, LoraLayer]) -> dict[str, object]:
    """Returns the adapter_config.json of these layers. Raises ConfigError if one file cannot describe them all."""
    shared = {(layer.dropout, layer.use_rslora, layer.variant.name) for layer in layers.values()}
    if len(shared) != 1:
        raise ConfigError(
            f"all layers of one adapter file have the same dropout, use_rslora and variant; got (dropout, use_rslora, "
            f"variant) {sorted(shared)}"
        )
    ((dropout, use_rslora, variant),) = shared
    targets = [TargetedLayer.of_adapter(name, layer) for name, layer in layers.items()]
    rank, rank_pattern = _usual_and_patterns({layer.peft_name: layer.rank for layer in targets}, model)
    alpha, alpha_pattern = _usual_and_patterns({layer.peft_name: layer.alpha for layer in targets}, model)
    stacks = [layer.name for layer in targets if layer.is_stack]
    routers = [layer.name for layer in targets if layer.is_router]
    linear = [layer.name for layer in targets if not layer.is_stack and not layer.is_router]
    parameters = [*(_common_endings(stacks, model) or sorted(stacks)), *_router_weights(routers, model)]
    base_model = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return {
        "peft_type": "LORA",
        "task_type": task_of(model).peft_type if architecture.is_transformers_model(model) else None,
        "base_model_name_or_path": base_model and (hub_id(Path(base_model)) or base_model),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        **peft_options(VARIANTS[variant]),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": peft_target_modules(linear, model),
        "target_parameters": parameters or None,
        # True if any weight is stored as (in, out); on loading, each layer determines this itself.
        "fan_in_fan_out": any(layers[name].stored_transposed for name in linear),
        "inference_mode": True,
    }


# Entries of a classifier's config that its adapter keeps beside the names of the labels.
LABEL_ENTRIES = ("problem_type", "pad_token_id")


def write_labels(folder: Path, model: nn.Module) -> None:
    """Writes the labels of a classifier to the folder of its adapter. Nothing is written for other models."""
    config = getattr(model, "config", None)
    if config is None or not task_of(model).has_labels:
        return
    names = {str(number): name for number, name in sorted(config.id2label.items())}
    entries = {name: architecture.config_value(config, name) for name in LABEL_ENTRIES}
    write_json(folder / LABELS_FILE, {"id2label": names, **entries}, sort_keys=False)


def set_labels_of_adapter_(model: nn.Module, folder: Path) -> None:
    """Gives a classifier the names of the labels of an adapter that was put on it."""
    config: Any = getattr(model, "config", None)
    found = read_labels(folder) if config is not None and label_head(model) else None
    if found is None or len(found["id2label"]) != config.num_labels:
        return
    names = list(found["id2label"].values())
    config.id2label, config.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
    for entry in LABEL_ENTRIES:
        if found.get(entry) is not None:
            setattr(config, entry, found[entry])
            if entry != "problem_type":
                setattr(architecture.text_config(config), entry, found[entry])
