"""How llama.cpp is told of rotary positions: settings, and the tensors of factors that some scalings need.

llama.cpp reads the base frequency, linear and YaRN scaling from settings, and Llama 3's and Phi 3's from a tensor that
the frequencies of each pair of values are divided by. What it has no word for is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_lite.export.gguf.library import GgufTensor, Settings, gguf

FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT, LINEAR, YARN, LLAMA3, LONGROPE = "default", "linear", "yarn", "llama3", "longrope"
# The parameters that are read, by the kind of scaling. A null is as good as none.
READ = {
    DEFAULT: (),
    LINEAR: ("factor",),
    YARN: ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    LLAMA3: ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    LONGROPE: ("factor", "original_max_position_embeddings", "long_factor", "short_factor", "attention_factor"),
}
ALWAYS_READ = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
# Values that change nothing.
NEUTRAL = {"truncate": True}


def rope_parameters(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the parameters of a config, and those of its layers with a sliding window if they have their own."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    if FULL not in found and SLIDING not in found:
        return found, None
    return dict(found.get(FULL) or {}), dict(found.get(SLIDING) or {})


def rotary_size(config: Any) -> int:
    """Returns the number of values of a head that are rotated."""
    share = rope_parameters(config)[0].get("partial_rotary_factor") or 1.0
    return int(head_size(config) * share)


def head_size(config: Any) -> int:
    """Returns the number of values of a head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def rope_problems(config: Any, kinds: tuple[str, ...], may_be_partial: bool) -> list[str]:
    """Returns what llama.cpp cannot be told of. kinds: of scaling that it knows for this family."""
    full, sliding = rope_parameters(config)
    problems = []
    for parameters, known in ((full, kinds), (sliding or {}, (DEFAULT,))):
        kind = parameters.get("rope_type", DEFAULT)
        if kind not in known:
            problems.append(f"rope_type {kind!r}, where llama.cpp knows {', '.join(known)}")
            continue
        others = [
            f"{key} {value!r}"
            for key, value in parameters.items()
            if key not in (*ALWAYS_READ, *READ[kind]) and value is not None and NEUTRAL.get(key) != value
        ]
        problems += [f"{other} in the rope parameters, which llama.cpp has no word for" for other in others]
        if not may_be_partial and (parameters.get("partial_rotary_factor") or 1.0) != 1.0:
            problems.append(
                f"partial_rotary_factor {parameters['partial_rotary_factor']}, where all values are rotated"
            )
    return problems


def rope_settings(config: Any) -> Settings:
    """Returns the settings of rotary positions."""
    full, sliding = rope_parameters(config)
    settings: Settings = {"rope_freq_base": float(full["rope_theta"])}
    if sliding is not None:
        settings["rope_freq_base_swa"] = float(sliding["rope_theta"])
    kind = full.get("rope_type", DEFAULT)
    if kind in (LINEAR, YARN):
        settings |= {"rope_scaling_type": gguf().RopeScalingType(kind), "rope_scaling_factor": float(full["factor"])}
    if kind == YARN:
        trained = full.get("original_max_position_embeddings") or config.max_position_embeddings
        settings["rope_scaling_orig_ctx_len"] = int(trained)
        for key in ("beta_fast", "beta_slow"):
            if full.get(key) is not None:
                settings[f"rope_scaling_yarn_{key}"] = float(full[key])
    if kind == LONGROPE:
        settings |= {"rope_scaling_orig_ctx_len": _trained_length(config, full)}
        settings["rope_scaling_attn_factors"] = _longrope_attention(config, full)
    return settings


def rope_tensors(config: Any) -> list[GgufTensor]:
    """Returns the tensors of factors that the frequencies are divided by."""
    full, _ = rope_parameters(config)
    kind = full.get("rope_type", DEFAULT)
    if kind == LLAMA3:
        return [_tensor("rope_freqs.weight", llama3_factors(full, rotary_size(config)))]
    if kind == LONGROPE:
        pairs = {name: torch.tensor(full[f"{name}_factor"], dtype=torch.float32) for name in ("long", "short")}
        return [_tensor(f"rope_factors_{name}.weight", factors) for name, factors in pairs.items()]
    return []


def _tensor(name: str, values: Tensor) -> GgufTensor:
    return GgufTensor(name, tuple(values.shape), "f32", _always([values]))


def _always(pieces: list[Tensor]) -> Callable[[], list[Tensor]]:
    return lambda: pieces


def llama3_factors(parameters: Mapping[str, Any], size: int) -> Tensor:
    """Returns what Llama 3.1 divides the frequency of each pair by: 1 for short waves, `factor` for long ones.

    Between them, the share of the unscaled frequency grows linearly with (trained length / wavelength).
    """
    theta = float(parameters["rope_theta"])
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    factor, low, high = (float(parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    waves = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    unscaled: Tensor = ((waves - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / ((1.0 - unscaled) / factor + unscaled)).float()


def _trained_length(config: Any, parameters: Mapping[str, Any]) -> int:
    own = parameters.get("original_max_position_embeddings")
    return int(own or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings)


def _longrope_attention(config: Any, parameters: Mapping[str, Any]) -> float:
    """Returns what attention logits' rotated halves are multiplied by in a context longer than the trained one."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    trained = _trained_length(config, parameters)
    grown = float(parameters.get("factor") or config.max_position_embeddings / trained)
    return 1.0 if grown <= 1 else math.sqrt(1 + math.log(grown) / math.log(trained))
