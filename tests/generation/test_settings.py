"""Tests of GenerationSettings: what is refused, and what transformers is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from qlora_lite.errors import ConfigError
from qlora_lite.generation.settings import GenerationSettings, complete_config, draws


def completed(settings: GenerationSettings, **of_model: Any) -> Any:
    return complete_config(SimpleNamespace(generation_config=GenerationConfig(**of_model)), settings, [1, 7], 0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"temperature": -0.1}, "temperature must be at least 0; got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a finite number; got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"seed": -1}, "seed must be a whole number from 0 on; got -1"),
        ({"temperature": 0, "top_k": 5, "seed": 1}, "top_k, seed and temperature 0, which draws nothing, exclude each"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        GenerationSettings(**options)


def test_what_is_left_open_is_the_models() -> None:
    made = completed(GenerationSettings(max_new_tokens=9), do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    assert (made.do_sample, made.temperature, made.top_p, made.top_k) == (True, 0.6, 0.9, 20)
    assert (made.max_new_tokens, made.max_length, made.eos_token_id, made.pad_token_id) == (9, None, [1, 7], 0)
    changed = completed(GenerationSettings(temperature=1.5, top_k=3), do_sample=True, temperature=0.6, top_p=0.9)
    assert (changed.temperature, changed.top_p, changed.top_k) == (1.5, 0.9, 3)


def test_temperature_0_and_models_without_sampling_take_the_likeliest_token() -> None:
    for made in (
        completed(GenerationSettings(temperature=0), do_sample=True, top_p=0.5),
        completed(GenerationSettings()),
    ):
        assert made.do_sample is False and made.temperature is made.top_p is made.top_k is None
    drawn = completed(GenerationSettings(top_p=0.8))
    assert drawn.do_sample is True and drawn.top_p == 0.8 and drawn.top_k == 0  # not transformers' 50


def test_what_would_change_the_form_of_the_result_is_set_back() -> None:
    made = completed(GenerationSettings(), num_beams=4, return_dict_in_generate=True, max_length=50, use_cache=False)
    assert (made.num_beams, made.return_dict_in_generate, made.max_length, made.use_cache) == (1, False, None, True)


def test_a_seed_without_effect_is_refused() -> None:
    seeded = GenerationSettings(seed=3)
    assert draws(GenerationConfig(do_sample=True), seeded)
    with pytest.raises(
        ConfigError, match="seed 3 has no effect, since this model takes the likeliest token; set a temp"
    ):
        draws(GenerationConfig(), seeded)
