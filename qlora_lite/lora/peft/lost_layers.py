"""Layers whose adapters are lost in peft 0.21, by the type of the base model: not loaded, refused, or misread.

transformers 5 keeps the experts of some families in stacks; until then each was linear layers. For an adapter from that
time, peft takes the names of those layers out of `target_modules` and puts the stacks into `target_parameters`. It does
so for every adapter on a model of such a type. So the adapters of dense MLPs and shared experts, which have the same
names and are still linear layers, are not loaded, and peft's only word is a warning about keys of the stacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from qlora_lite.errors import listing

# peft/utils/transformers_weight_conversion.py, _MOE_TARGET_MODULE_MAPPING: the names that are taken out.
_MIXTRAL_NAMES = ("gate", "w1", "w2", "w3")
_QWEN_NAMES = ("gate", "gate_proj", "up_proj", "down_proj")
# transformers/conversion_mapping.py, _MODEL_TO_CONVERSION_PATTERN: the types of models whose experts are converted as
# Mixtral's and Qwen2-MoE's are. peft adds Mixtral itself; Qwen2-MoE is not in the table.
_MIXTRAL_TYPES = ("minimax", "minimax_m2", "mixtral")
_QWEN_TYPES = (
    *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
    *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe"),
    *("longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text"),
    *("qwen3_omni_moe_thinker", "solar_open"),
)
RENAMED = {**dict.fromkeys(_MIXTRAL_TYPES, _MIXTRAL_NAMES), **dict.fromkeys(_QWEN_TYPES, _QWEN_NAMES)}
# peft/tuners/tuners_utils.py, _check_lora_target_modules_mamba
MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_REFUSED = ("out_proj", "conv1d")
# transformers/models/rwkv/modeling_rwkv.py, _rescale_layers, and the default of rescale_every.
RWKV_RESCALED = (".attention.output", ".feed_forward.value")
RWKV_RESCALE_EVERY = 6
# transformers/conversion_mapping.py: the rules "mlp.shared_expert." -> "mlp.shared_experts." and "sconv.weight_proj" ->
# "sconv.weight_proj.weight", which peft applies to the keys of adapters, match their own results.
MANGLED = {"laguna": r"\.mlp\.shared_experts\.", "inkling2_text": r"(convolution|sconv)\.weight_proj$"}
BLOCK = re.compile(r"\.(\d+)\.")
SHOWN = 3


def _renamed(model_type: str, name: str) -> bool:
    return name.rpartition(".")[2] in RENAMED.get(model_type, ())


def _mangled(model_type: str, name: str) -> bool:
    return model_type in MANGLED and re.search(MANGLED[model_type], name) is not None


def _refused(model_type: str, name: str) -> bool:
    return model_type in MAMBA_TYPES and name.rpartition(".")[2] in MAMBA_REFUSED


def _rescaled(model_type: str, name: str) -> bool:
    block = BLOCK.search(name)
    is_late = block is not None and int(block[1]) >= RWKV_RESCALE_EVERY
    return model_type == "rwkv" and name.endswith(RWKV_RESCALED) and is_late


# Which layers, and what is said about them.
_RULES = (
    (
        _renamed,
        "peft would not load the adapters of {layers}: in models of type {type} it takes these names for stacks of "
        "experts",
    ),
    (_mangled, "peft would not load the adapters of {layers}: in models of type {type} it renames them"),
    (_refused, "peft refuses adapters on {layers}: it does not take them in models of type {type}"),
    (
        _rescaled,
        "peft would compute something else with the adapters of {layers}: transformers divides the weights of these "
        "layers in evaluation, without their adapters (rescale_every of an {type})",
    ),
)
REMEDY = "leave them out of target_modules, or ship the merged model"


def lost_in_peft(model_type: str, names: Iterable[str]) -> list[str]:
    """Returns sentences about those of these adapted layers, no stacks and no routers, that are lost in peft.

    model_type: of the base, as its config has it.
    """
    names, sentences = list(names), []
    for applies, sentence in _RULES:
        if found := [name for name in names if applies(model_type, name)]:
            layers = f"{len(found)} layers ({listing(found, SHOWN)})"
            sentences.append(f"{sentence.format(layers=layers, type=model_type)}; {REMEDY}")
    return sentences
