"""Fixtures of the tests of calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite.calibration import calibrate


def make_rows(rows: int, tokens: int, vocabulary: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of two rows of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
    return [{"input_ids": part} for part in ids.split(2)]


@pytest.fixture(scope="session")
def random_rows() -> Callable[..., Any]:
    return make_rows


@pytest.fixture(scope="session")
def calibrated(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A calibrated folder of the tiny model, and the report."""
    folder = tmp_path_factory.mktemp("calibrated") / "out"
    text, others = make_rows(6, 48, 100), make_rows(4, 48, 100, seed=1)
    return folder, calibrate(tiny_folder, folder, text, held_out=others)
