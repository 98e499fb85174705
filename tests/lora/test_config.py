"""Tests of LoraConfig: wrong settings, and patterns that choose rank and alpha by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_lite.errors import ConfigError
from qlora_lite.lora.config import LoraConfig


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("target_modules", 5),
        ("rank", 0),
        ("rank", True),
        ("alpha", float("nan")),
        ("alpha", 10**400),
        ("dropout", 1.0),
        ("target_modules", []),
        ("exclude_modules", "all-linear"),
        ("exclude_modules", [3]),
        ("layers_to_transform", [True]),
        ("layers_to_transform", []),
        ("layers_to_transform", 3),
        ("adapter_dtype", torch.int8),
        ("use_rslora", 1),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 2.5}),
        ("rank_pattern", {3: 2}),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"q_proj": float("inf")}),
        ("alpha_pattern", {"(?i)q_proj": 2}),
    ],
)
def test_wrong_value_is_named(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        LoraConfig(**{setting: value})


def test_the_first_pattern_that_matches_decides() -> None:
    config = LoraConfig(8, 16, rank_pattern={"layers.1.q": 2, "q|k": 4}, alpha_pattern={"^layers.*": 3.5})
    names = ["layers.0.q", "layers.1.q", "layers.0.k", "layers.0.v", "x.layers.1.q"]
    assert [config.rank_of(name) for name in names] == [4, 2, 4, 8, 2]
    assert [config.alpha_of(name) for name in names] == [3.5] * 4 + [16]
    assert config.unused_patterns(names) == []
    # Before "layers.1.q", "q" has decided for all that it matches.
    idle = LoraConfig(rank_pattern={"q": 4, "layers.1.q": 2}, alpha_pattern={"z": 1}).unused_patterns(names)
    assert [sentence.split(" decides")[0] for sentence in idle] == [
        "rank_pattern ['layers.1.q']",
        "alpha_pattern ['z']",
    ]
    assert "adapted are: k, q, v" in idle[0]
