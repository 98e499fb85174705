"""Settings refuse what they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_lite.checks import dtype_named
from qlora_lite.errors import ConfigError
from qlora_lite.lora.config import LoraConfig
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.training.config import TrainConfig, checkpointing_named


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (QuantConfig, "format", "nf5"),
        (QuantConfig, "blocksize", 100),
        (QuantConfig, "double_quant", 1),
        (QuantConfig, "compute_dtype", torch.int8),
        (QuantConfig, "embedding_format", "nf4"),
        (QuantConfig, "skip_modules", "lm_head"),
        (QuantConfig, "skip_modules", 3),
        (LoraConfig, "target_modules", 5),
        (TrainConfig, "learning_rate", 1e39),
        (TrainConfig, "save_steps", 0),
        (TrainConfig, "keep_last", 0),
        (TrainConfig, "keep_best", -1),
        (TrainConfig, "warmup_steps", 101),
        (LoraConfig, "rank", 0),
        (LoraConfig, "rank", True),
        (LoraConfig, "alpha", float("nan")),
        (LoraConfig, "alpha", 10**400),
        (LoraConfig, "dropout", 1.0),
        (LoraConfig, "target_modules", []),
        (LoraConfig, "exclude_modules", "all-linear"),
        (LoraConfig, "exclude_modules", [3]),
        (LoraConfig, "layers_to_transform", [True]),
        (LoraConfig, "layers_to_transform", []),
        (LoraConfig, "layers_to_transform", 3),
        (LoraConfig, "adapter_dtype", torch.int8),
        (LoraConfig, "use_rslora", 1),
        (LoraConfig, "rank_pattern", ["q_proj"]),
        (LoraConfig, "rank_pattern", {"q_proj": 2.5}),
        (LoraConfig, "rank_pattern", {3: 2}),
        (LoraConfig, "rank_pattern", {"(": 2}),
        (LoraConfig, "alpha_pattern", {"q_proj": float("inf")}),
        (LoraConfig, "alpha_pattern", {"(?i)q_proj": 2}),
        (TrainConfig, "steps", 0),
        (TrainConfig, "learning_rate", float("inf")),
        (TrainConfig, "warmup_steps", -1),
        (TrainConfig, "weight_decay", -0.1),
        (TrainConfig, "gradient_accumulation", 0),
        (TrainConfig, "max_grad_norm", 0.0),
        (TrainConfig, "optimizer", "sgd"),
        (TrainConfig, "checkpointing", "half"),
        (TrainConfig, "seed", -1),
    ],
)
def test_wrong_value_is_named(kind: Any, setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=setting):
        kind(**{setting: value})


def test_the_first_pattern_that_matches_decides() -> None:
    config = LoraConfig(8, 16, rank_pattern={"layers.1.q": 2, "q|k": 4}, alpha_pattern={"^layers.*": 3.5})
    names = ["layers.0.q", "layers.1.q", "layers.0.k", "layers.0.v", "x.layers.1.q"]
    assert [config.rank_of(name) for name in names] == [4, 2, 4, 8, 2]
    assert [config.alpha_of(name) for name in names] == [3.5] * 4 + [16]
    assert config.idle_patterns(names) == []
    # Before "layers.1.q", "q" has decided for all that it matches.
    idle = LoraConfig(rank_pattern={"q": 4, "layers.1.q": 2}, alpha_pattern={"z": 1}).idle_patterns(names)
    assert [sentence.split(" decides")[0] for sentence in idle] == [
        "rank_pattern ['layers.1.q']",
        "alpha_pattern ['z']",
    ]
    assert "adapted are: k, q, v" in idle[0]


def test_dtype_names() -> None:
    assert dtype_named("bf16") is torch.bfloat16 and dtype_named("float32") is torch.float32
    with pytest.raises(ConfigError, match="got 'int8'"):
        dtype_named("int8")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("full", "full"),
        ("none", "none"),
        ("300MiB", 300 * 2**20),
        ("1.5 gib", 3 * 2**29),
        ("7", 7),
        (20 * "9", 10**20 - 1),
    ],
)
def test_a_dial_is_a_word_or_a_size(text: str, wanted: object) -> None:
    assert checkpointing_named(text) == wanted


@pytest.mark.parametrize("text", ["half", "MiB", "3 parsecs", "-1", "1e400", 5000 * "9"])
def test_no_dial_is_made_of_other_words(text: str) -> None:
    with pytest.raises(ConfigError, match="or a size such as 300MiB"):
        checkpointing_named(text)


def test_what_64_bits_do_not_hold_is_too_large() -> None:
    with pytest.raises(ConfigError, match=r"steps must be an integer of at least 1 and below 2\*\*63; got 1000"):
        TrainConfig(steps=10**30)
    with pytest.raises(ConfigError, match="rank must be at most 65536; got 65537"):
        LoraConfig(rank=2**16 + 1)
