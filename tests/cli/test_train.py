"""`qlora-lite train`: what its words mean, and what it must not write over. (Whole runs: test_cli.py.)"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lite.cli.train import _target_settings
from qlora_lite.errors import ConfigError

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_words_are_lists_of_names_and_numbers() -> None:
    assert _target_settings("all-linear", None, None) == {"target_modules": "all-linear", "layers_to_transform": None}
    chosen = _target_settings("q_proj, v_proj", "layers.0.q_proj", "0-2,5")
    assert chosen["target_modules"] == ["q_proj", "v_proj"] and chosen["exclude_modules"] == ["layers.0.q_proj"]
    assert list(chosen["layers_to_transform"]) == [0, 1, 2, 5]
    with pytest.raises(ConfigError, match="layers"):
        _target_settings("all-linear", None, "first")


def test_the_data_is_never_overwritten(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "metrics.jsonl"
    data.write_text('{"text": "mine"}\n')
    done = run("train", "--model", tiny_folder, "--data", data, "--output", tmp_path, "--overwrite", "--steps", 1)
    assert done.returncode == 1 and "would replace the input" in done.stderr
    assert data.read_text() == '{"text": "mine"}\n'
