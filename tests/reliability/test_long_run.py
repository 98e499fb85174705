"""A short version of long_run.py: no file or tensor is left behind, and the fitted slope is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def long_run(import_script: Callable[[str], Any]) -> Any:
    return import_script("tests/reliability/long_run.py")


def test_a_run_leaves_no_file_and_no_tensor_behind(long_run: Any, tmp_path: Path) -> None:
    seen = long_run.soak(tmp_path, 40)
    assert seen.files[0] == seen.files[1] > 0 and seen.tensors[0] == seen.tensors[1] > 100
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 40


def test_a_leak_is_no_noise(long_run: Any) -> None:
    slope, error = long_run.fitted_slope([1000 + 5000 * step + 300 * (step % 3) for step in range(100)])
    assert abs(slope - 5000) < 1 and 0 < error < 2
    kept, files, tensors = (400.0, 50.0), (5, 5), (200, 200)
    assert long_run.Soak(2000, *kept, files, tensors).is_flat
    assert not long_run.Soak(2000, slope, error, files, tensors).is_flat
    assert not long_run.Soak(2000, *kept, (5, 6), tensors).is_flat
    assert not long_run.Soak(2000, *kept, files, (200, 201)).is_flat
