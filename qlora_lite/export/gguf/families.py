"""The model families that are written as GGUF: their names in llama.cpp, what it computes, which settings it reads.

A row of `FAMILIES` says under which architecture llama.cpp has a `model_type` of transformers, how the values of its
tensors differ there (llama.cpp's convert_hf_to_gguf.py), and what llama.cpp has built in (src/llama-model.cpp and
src/models): a config that asks for something else is refused, because llama.cpp would compute another model without a
word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_lite.errors import CheckpointError, listing
from qlora_lite.export.gguf.library import FILE_TYPES, Settings, gguf
from qlora_lite.export.gguf.rope import (
    DEFAULT,
    FULL,
    LINEAR,
    LLAMA3,
    LONGROPE,
    SLIDING,
    YARN,
    head_size,
    rope_problems,
    rope_settings,
    rotary_size,
)

GEMMA_ACTIVATION = "gelu_pytorch_tanh"
# One layer of six has no window in Gemma 3, one of two in Gemma 2 (set_swa_pattern in llama.cpp).
GEMMA2_PERIOD, GEMMA3_PERIOD = 2, 6
# llama.cpp's Gemmas of 27 billion parameters, by their layers, scale attention by the width of a head's share.
WIDE_GEMMAS = {"gemma2": 46, "gemma3": 62}
# What stabilizes norms, under the names of configs.
EPSILONS = {
    "rms_norm_eps": "layer_norm_rms_eps",
    "layer_norm_epsilon": "layer_norm_eps",
    "norm_epsilon": "layer_norm_eps",
}


@dataclass(frozen=True)
class Family:
    """How llama.cpp has a model family.

    settings: those besides the ones that all families have. fixed: values of the config that llama.cpp computes with
    whatever the file says. problems: what else in a config it would not compute. rope: the kinds of scaling that it
    knows, none for learned positions. permuted: rows of Q and K in the order of rotated pairs. norm_plus_one: norms
    multiply by the weight, where transformers multiplies by 1 + weight. transposed: ends of names of weights that
    transformers has as (in, out). own_head: whether there may be a head besides the embedding. limits_context: attends
    to everything, so the context must end with the window.
    """

    architecture: str
    settings: Callable[[Any], Settings] = lambda config: {}
    fixed: Mapping[str, object] = field(default_factory=dict)
    problems: Callable[[Any], list[str]] = lambda config: []
    rope: tuple[str, ...] = (DEFAULT, LINEAR, YARN)
    partial_rope: bool = False
    permuted: bool = False
    norm_plus_one: bool = False
    transposed: tuple[str, ...] = ()
    own_head: bool = True
    limits_context: bool = True


def _llama(config: Any) -> Settings:
    return {"rope_dimension_count": rotary_size(config)}


def _experts(config: Any) -> Settings:
    count = getattr(config, "num_local_experts", None) or config.num_experts
    return {"expert_count": count, "expert_used_count": config.num_experts_per_tok}


def _qwen_experts(config: Any) -> Settings:
    settings = {**_experts(config), "expert_feed_forward_length": config.moe_intermediate_size}
    if getattr(config, "shared_expert_intermediate_size", None) is not None:
        settings["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return settings


def _gemma2(config: Any) -> Settings:
    return {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
        "sliding_window": config.sliding_window,
    }


def _phi3(config: Any) -> Settings:
    window = getattr(config, "sliding_window", None) or 0
    trained = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    dimensions = {"rope_dimension_count": rotary_size(config), "rope_scaling_orig_ctx_len": trained}
    return {**dimensions, "sliding_window": window}


def _gpt2(config: Any) -> Settings:
    return {"feed_forward_length": config.n_inner or 4 * config.hidden_size}


def _gemma_problems(architecture: str, period: int) -> Callable[[Any], list[str]]:
    def found(config: Any) -> list[str]:
        expected = [FULL if number % period == period - 1 else SLIDING for number in range(config.num_hidden_layers)]
        problems = [] if config.layer_types == expected else [f"layer_types other than one {FULL} in every {period}"]
        wide = config.num_hidden_layers == WIDE_GEMMAS[architecture]
        scale = config.hidden_size // config.num_attention_heads if wide else head_size(config)
        if config.query_pre_attn_scalar != scale:
            problems.append(f"query_pre_attn_scalar {config.query_pre_attn_scalar}, where llama.cpp has {scale}")
        return problems

    return found


def _gemma2_problems(config: Any) -> list[str]:
    caps = [key for key in ("attn_logit_softcapping", "final_logit_softcapping") if getattr(config, key) is None]
    return [*_gemma_problems("gemma2", GEMMA2_PERIOD)(config), *(f"no {key}" for key in caps)]


_SILU: Mapping[str, object] = {"hidden_act": "silu"}
_ALL_EXPERTS: Mapping[str, object] = {**_SILU, "decoder_sparse_step": 1, "mlp_only_layers": []}
_GPT2_FIXED: Mapping[str, object] = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_GEMMA3_FIXED: Mapping[str, object] = {
    "hidden_activation": GEMMA_ACTIVATION,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}

# By the model_type of transformers.
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _llama, _SILU, rope=(DEFAULT, LINEAR, YARN, LLAMA3), permuted=True),
    "mistral": Family("llama", _llama, _SILU, permuted=True),
    "mixtral": Family("llama", lambda config: {**_llama(config), **_experts(config)}, _SILU, permuted=True),
    "qwen2": Family("qwen2", fixed=_SILU),
    "qwen3": Family("qwen3", fixed={**_SILU, "attention_bias": False}),
    "qwen2_moe": Family("qwen2moe", _qwen_experts, {**_ALL_EXPERTS, "norm_topk_prob": False}),
    "qwen3_moe": Family("qwen3moe", _qwen_experts, {**_ALL_EXPERTS, "norm_topk_prob": True, "attention_bias": False}),
    "gemma": Family(
        "gemma",
        fixed={"hidden_act": GEMMA_ACTIVATION, "attention_bias": False},
        norm_plus_one=True,
        own_head=False,
    ),
    "gemma2": Family(
        "gemma2",
        _gemma2,
        {"hidden_activation": GEMMA_ACTIVATION, "attention_bias": False},
        _gemma2_problems,
        norm_plus_one=True,
        own_head=False,
        limits_context=False,
    ),
    "gemma3_text": Family(
        "gemma3",
        lambda config: {"sliding_window": config.sliding_window},
        _GEMMA3_FIXED,
        _gemma_problems("gemma3", GEMMA3_PERIOD),
        rope=(DEFAULT, LINEAR),
        norm_plus_one=True,
        own_head=False,
        limits_context=False,
    ),
    "phi3": Family("phi3", _phi3, _SILU, rope=(DEFAULT, LONGROPE), partial_rope=True, limits_context=False),
    "gpt2": Family(
        "gpt2",
        _gpt2,
        _GPT2_FIXED,
        rope=(),
        transposed=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
    ),
    "starcoder2": Family("starcoder2", fixed={"hidden_act": GEMMA_ACTIVATION, "use_bias": True}),
}


def family_of(config: Any) -> Family:
    """Returns the row of a config. Raises CheckpointError for a family, or a config, that cannot be written."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise CheckpointError(f"a GGUF file cannot be written of model type {kind!r}; known are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    problems = [
        f"{key} {getattr(config, key)!r}, where llama.cpp has {value!r}"
        for key, value in family.fixed.items()
        if getattr(config, key, value) != value and (value or getattr(config, key))
    ]
    problems += family.problems(config)
    problems += rope_problems(config, family.rope, family.partial_rope) if family.rope else []
    if problems:
        raise CheckpointError(
            f"a GGUF file of this {kind} would be computed differently by llama.cpp: its config has "
            f"{listing(problems, 4, '; ')}"
        )
    return family


def context_length(config: Any, family: Family) -> int:
    """Returns the tokens that llama.cpp and the model agree on: those within a window that llama.cpp lacks."""
    length = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(length, int(window)) if window and family.limits_context else length


def model_settings(config: Any, family: Family, type: str, rows: int) -> Settings:
    """Returns the settings of a model. rows: those of its embedding."""
    heads = config.num_attention_heads
    settings: Settings = {
        "block_count": config.num_hidden_layers,
        "context_length": context_length(config, family),
        "embedding_length": config.hidden_size,
        "head_count": heads,
        "head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "vocab_size": rows,
        "file_type": gguf().LlamaFileType[FILE_TYPES[type]],
        "quantization_version": gguf().GGML_QUANT_VERSION,
    }
    if getattr(config, "intermediate_size", None) is not None:
        settings["feed_forward_length"] = config.intermediate_size
    if family.rope:
        settings |= {"key_length": head_size(config), "value_length": head_size(config)}
    for key, named in EPSILONS.items():
        if getattr(config, key, None) is not None:
            settings[named] = float(getattr(config, key))
    settings |= family.settings(config)
    return {**settings, **(rope_settings(config) if family.rope else {})}
