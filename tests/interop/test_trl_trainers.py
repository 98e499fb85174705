"""Tests of trl_trainers.py: some of its cases, and that cases can fail. Interop runs all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def trl_trainers(import_script: Callable[[str], Any]) -> Any:
    return import_script("tests/interop/trl_trainers.py")


@pytest.mark.parametrize("case", ["sft_assistant_only", "dpo", "reward", "grpo"])
def test_a_trainer_learns_on_a_packed_base_as_on_the_unpacked_one(
    trl_trainers: Any, case: str, tiny_folder: Path, tmp_path: Path
) -> None:
    trl_trainers.check(case, tiny_folder, tmp_path)


def test_cases_fail_where_something_is_wrong(
    trl_trainers: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = trl_trainers.unpacked

    def other_weights(model: Any) -> Any:
        changed = own(model)
        torch.nn.init.normal_(changed.model.layers[1].mlp.down_proj.weight)
        return changed

    monkeypatch.setattr(trl_trainers, "unpacked", other_weights)
    with pytest.raises(AssertionError, match="step 1: loss is"):
        trl_trainers.check("sft", tiny_folder, tmp_path)
