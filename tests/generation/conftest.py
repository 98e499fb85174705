"""A tiny model in fp32 and its tokenizer, for the tests of this room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.checkpoints import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: Path) -> Any:
    return load_tokenizer(tiny_folder)


@pytest.fixture
def model(tiny_folder: Path) -> Any:
    """In fp32 and unpacked, so that answers do not depend on the number of rows."""
    return load_quantized(tiny_folder, QuantConfig(format="none"), dtype=torch.float32)
