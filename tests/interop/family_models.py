"""Tiny random models of every family that transformers maps to a causal language model.

A config is made small by the names of its entries, by rules for entries that hold one value for each layer, and by what
a family needs besides (family_configs.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from family_configs import DROPOUTS, ENCODERS, FAMILIES, LEFT_OUT, PER_LAYER, SHAPES, SIZES, TOKEN_IDS, WHOLE


def families() -> list[str]:
    """Every family of transformers' mapping, and the further shapes of some."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *SHAPES, *WHOLE]


def _entry(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yields the entry with its small value, if it has one."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if name in TOKEN_IDS and (number or isinstance(value, list)):
        yield name, TOKEN_IDS[name]
    elif name in SIZES and isinstance(value, int) and number and value > 0:
        # A family may have fewer experts than that by default.
        yield name, min(SIZES[name], value) if "experts" in name or "top" in name else SIZES[name]
    elif DROPOUTS.search(name) and (number or isinstance(value, float)):
        yield name, 0.0


def _layers(default: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Returns the number of layers, so many that each kind of layer is there, and the kinds of all layers."""
    name = next((n for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in made), None)
    kinds = {key: list(dict.fromkeys(default.get(key) or [])) for key in PER_LAYER if key.endswith(("types", "type"))}
    kinds = {key: found for key, found in kinds.items() if found and all(isinstance(kind, str) for kind in found)}
    kinds.pop("indexer_types", None), kinds.pop("block_types", None)
    if name is None:
        return {}
    count = max([made[name], *(len(found) for found in kinds.values())])
    return {name: count, **{key: (found * count)[:count] for key, found in kinds.items()}}


def small_entries(default: Any, family: str, part: str = "") -> dict[str, Any]:
    """Returns arguments that make a small config like `default`."""
    entries, made = default.to_dict(), dict[str, Any]()
    for name, value in entries.items():
        if name in (getattr(type(default), "sub_configs", None) or ()):
            sub = getattr(default, name)
            if hasattr(sub, "to_dict"):
                made[name] = small_entries(sub, family, f"{part}:{name}")
        elif name not in PER_LAYER:
            made |= dict(_entry(name, value))
    made |= _layers(entries, made)
    plain = re.split(r"[+@]", family)[0]
    if plain in ENCODERS and "is_decoder" in entries:
        made["is_decoder"] = True
    if "kv_lora_rank" in made:
        made["num_key_value_heads"] = made["num_attention_heads"]
        if "head_dim" in made and entries.get("head_dim") == entries.get("qk_rope_head_dim"):
            made["head_dim"] = made["qk_rope_head_dim"]
    made |= FAMILIES.get(plain + part, {}) | ({} if part else SHAPES.get(family, {}))
    return {name: value for name, value in made.items() if value is not LEFT_OUT}


def small_config(family: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[re.split(r"[+@]", family)[0]]
    return kind(**small_entries(kind(), family))


@torch.no_grad()
def perturb_(model: torch.nn.Module) -> None:
    """Adds noise to every float that a checkpoint holds, so that one that is lost or swapped shows in the logits."""
    generator = torch.Generator().manual_seed(1)
    parameters = dict(model.named_parameters())
    # Of buffers, biases of routers alone: MiniMax holds its causal decay in others.
    biases = {name: buffer for name, buffer in model.named_buffers() if "bias" in name and buffer.dim() <= 2}
    for name, tensor in {**parameters, **biases}.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if not tensor.is_floating_point() or name.rpartition(".")[2] in owner._non_persistent_buffers_set:
            continue
        scale = 0.1
        if name in parameters and tensor.dim() >= 2:
            inputs = tensor.shape[-1] if "conv" not in name else max(1, tensor[0].numel())
            scale = 0.5 if any(word in name for word in ("embed", "wte", "wpe")) else 0.7 / math.sqrt(inputs)
        tensor.add_(scale * torch.randn(tensor.shape, generator=generator).to(tensor))
        if name.endswith("balancing_biases"):  # of Zaya: transformers sets the last one when it loads
            tensor[-1] = -1


def build(family: str, folder: Path) -> None:
    """Writes the checkpoint of a small random model."""
    import transformers

    torch.manual_seed(0)
    config = small_config(family)
    if family in WHOLE:
        model = getattr(transformers, WHOLE[family])(config).float().eval()
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    perturb_(model)
    model.save_pretrained(folder)
