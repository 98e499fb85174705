"""Tests of the checks of numbers, dtypes and sizes, and of the errors for NaN, infinity and overflow."""

from __future__ import annotations

import pytest
import torch

from qlora_lite.checks import cast_finite, check_finite, dtype_named
from qlora_lite.errors import ConfigError, QuantizationError
from qlora_lite.lora.config import LoraConfig
from qlora_lite.training.config import TrainConfig


def test_cast_finite_names_what_does_not_fit() -> None:
    with pytest.raises(QuantizationError, match=r"layer\.weight reaches 70000, above 65504"):
        cast_finite(torch.tensor([1.0, -70000.0]), torch.float16, "layer.weight")
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        cast_finite(torch.tensor([float("nan")]), torch.float16, "layer.weight")


def test_the_first_bad_index_is_named() -> None:
    weight = torch.ones(3, 4)
    assert check_finite(weight, "layer.weight") == 1.0
    weight[1, 2] = float("inf")
    with pytest.raises(QuantizationError, match=r"layer.weight holds inf at index \(1, 2\)"):
        check_finite(weight, "layer.weight")


def test_dtype_names() -> None:
    assert dtype_named("bf16") is torch.bfloat16 and dtype_named("float32") is torch.float32
    with pytest.raises(ConfigError, match="got 'int8'"):
        dtype_named("int8")


def test_what_64_bits_do_not_hold_is_too_large() -> None:
    with pytest.raises(ConfigError, match=r"steps must be an integer of at least 1 and below 2\*\*63; got 1000"):
        TrainConfig(steps=10**30)
    with pytest.raises(ConfigError, match="rank must be at most 65536; got 65537"):
        LoraConfig(rank=2**16 + 1)
