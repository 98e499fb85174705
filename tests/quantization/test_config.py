"""Tests of QuantConfig: wrong settings are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_lite.errors import ConfigError
from qlora_lite.quantization.config import QuantConfig


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("format", "nf5"),
        ("blocksize", 100),
        ("double_quant", 1),
        ("compute_dtype", torch.int8),
        ("embedding_format", "nf4"),
        ("skip_modules", "lm_head"),
        ("skip_modules", 3),
    ],
)
def test_wrong_value_is_named(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        QuantConfig(**{setting: value})
