"""Tests of rotary positions: factors against transformers' frequencies, settings, and what cannot be said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_lite.errors import CheckpointError
from qlora_lite.export.gguf.families import family_of
from qlora_lite.export.gguf.rope import llama3_factors, rope_settings, rope_tensors, rotary_size

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama(**rope: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(rope_parameters=rope, max_position_embeddings=131072)


def phi3(**rope: Any) -> Any:
    from transformers import Phi3Config

    factors = {"short_factor": [1.0 + i / 64 for i in range(48)], "long_factor": [1.0 + i for i in range(48)]}
    known = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096}
    return Phi3Config(
        rope_parameters={**known, **factors, **rope}, max_position_embeddings=131072,
        original_max_position_embeddings=4096, pad_token_id=None,
    )  # fmt: skip


def test_llama3_divides_frequencies_as_transformers_does() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = llama(**LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    factors = llama3_factors(config.rope_parameters, 128)
    torch.testing.assert_close(plain / factors, scaled, rtol=1e-5, atol=0)
    assert factors[0] == 1.0 and factors[-1] == 32.0
    (tensor,) = rope_tensors(config)
    assert tensor.name == "rope_freqs.weight" and tensor.shape == (64,)


def test_longrope_scales_attention_as_transformers_does() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = phi3()
    scaled, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=5000)
    settings, tensors = rope_settings(config), {tensor.name: tensor for tensor in rope_tensors(config)}
    assert settings["rope_scaling_attn_factors"] == pytest.approx(attention)
    assert settings["rope_scaling_orig_ctx_len"] == 4096
    (factors,) = tensors["rope_factors_long.weight"].pieces()
    size = rotary_size(config)
    torch.testing.assert_close(10000.0 ** -(torch.arange(0, size, 2) / size) / factors, scaled, rtol=1e-5, atol=0)
    assert tensors["rope_factors_short.weight"].shape == (48,)


def test_linear_and_yarn_are_settings() -> None:
    linear = rope_settings(llama(rope_type="linear", rope_theta=10000.0, factor=4.0))
    assert (linear["rope_scaling_type"].value, linear["rope_scaling_factor"]) == ("linear", 4.0)
    yarn = llama(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768, beta_fast=16)
    settings = rope_settings(yarn)
    assert (settings["rope_scaling_type"].value, settings["rope_scaling_orig_ctx_len"]) == ("yarn", 32768)
    assert settings["rope_scaling_yarn_beta_fast"] == 16.0 and settings["rope_freq_base"] == 1e6
    assert rope_tensors(yarn) == []


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (lambda: llama(rope_type="dynamic", rope_theta=1e4, factor=2.0), "rope_type 'dynamic', where llama.cpp knows"),
        (lambda: llama(rope_type="yarn", rope_theta=1e4, factor=2.0, mscale=0.7), "mscale 0.7 in the rope parameters"),
        (lambda: llama(rope_type="yarn", rope_theta=1e4, factor=2.0, attention_factor=1.2), "attention_factor 1.2"),
        (lambda: llama(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    ],
)
def test_what_llama_cpp_has_no_word_for_is_refused(config: Any, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        family_of(config())
