"""Tests of the batch that is chosen for a memory, on a made-up forecast and on a real one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_lite.errors import ConfigError
from qlora_lite.lora.config import LoraConfig
from qlora_lite.planning import batch_choice as module
from qlora_lite.planning.batch_choice import choose_batch
from qlora_lite.planning.forecast import TrainingSetup
from qlora_lite.planning.memory_plan import DeviceMemory
from qlora_lite.quantization.config import QuantConfig


@dataclass
class MadeUp:
    """A model of 1,000 bytes whose tokens take one byte each, or ten if nothing is recomputed."""

    config: object
    accelerator: bool

    def forecast(self, setup: TrainingSetup) -> Any:
        each = 10 if setup.checkpointing == "none" else 1
        return SimpleNamespace(peak=1000 + each * setup.rows * setup.tokens, model_bytes=1000, reserved=None)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Forecaster", MadeUp)
    monkeypatch.setattr(module, "fake_tensors", lambda accelerator: nullcontext())
    monkeypatch.setattr(module, "read_config", lambda path: None)
    monkeypatch.setattr(module, "check_batch_shape", lambda *shape: None)


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize(
    ("size", "rows", "tokens", "accumulated", "checkpointing"),
    [
        (100_000, 8, 512, 1, "none"),
        (10_000, 8, 512, 1, 9_000),
        (5_096, 8, 512, 1, "full"),
        (5_095, 4, 512, 2, 4_095),
        (1_600, 1, 512, 8, 600),
        (1_100, 1, 64, 8, 100),
    ],
)
def test_rows_are_given_up_before_tokens(
    size: int, rows: int, tokens: int, accumulated: int, checkpointing: str | int
) -> None:
    wanted = TrainingSetup(QuantConfig(), LoraConfig(2, 4), 8, 512)
    found = choose_batch("m", wanted, DeviceMemory(size, 0, False))
    assert (found.rows, found.tokens, found.gradient_accumulation) == (rows, tokens, accumulated)
    assert found.checkpointing == checkpointing and found.needed <= size


@pytest.mark.usefixtures("made_up")
def test_what_does_not_fit_is_one_sentence() -> None:
    wanted = TrainingSetup(QuantConfig(), LoraConfig(2, 4), 8, 512)
    with pytest.raises(ConfigError, match=r"one row of 64 tokens needs 1\.0 KiB, even if .* give more memory"):
        choose_batch("m", wanted, DeviceMemory(1_050, 0, False))


def test_a_real_model_fits(tiny_folder: Path) -> None:
    wanted = TrainingSetup(QuantConfig(), LoraConfig(2, 4), 2, 64)
    found = choose_batch(tiny_folder, wanted, DeviceMemory(1 << 30, 0, False))
    assert (found.rows, found.tokens, found.checkpointing) == (2, 64, "none") and 0 < found.needed < 1 << 26
