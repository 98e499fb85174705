"""Tests of choosing the checkpointing of a training run by a memory budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_lite import LoraConfig, QuantConfig, TrainConfig
from qlora_lite.errors import ConfigError
from qlora_lite.planning import memory_budget
from qlora_lite.planning.forecast import TrainingSetup
from qlora_lite.planning.memory_budget import BudgetedConfig, config_within, device_memory
from qlora_lite.planning.memory_plan import DeviceMemory, checkpointing_within
from qlora_lite.planning.training_rehearsal import read_config


def test_overhead_of_a_process_is_measured_and_of_a_device_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_memory(1 << 30, accelerator=True) == DeviceMemory(1 << 30, 512 << 20, True, "assumed")
    assert device_memory(1 << 30, accelerator=False, overhead=3 << 20) == DeviceMemory(1 << 30, 3 << 20, False)
    assert device_memory(1 << 30, accelerator=False).overhead > 50 << 20
    monkeypatch.setattr(memory_budget, "resident_bytes", lambda: None)
    with pytest.raises(ConfigError, match="does not report how much memory a process takes; give the overhead"):
        device_memory(1 << 30, accelerator=False)


@pytest.mark.parametrize("spare", [0, 1 << 30])
def test_the_config_gets_the_checkpointing_of_the_plan(tiny_folder: Path, spare: int) -> None:
    quant, lora, config = QuantConfig(), LoraConfig(rank=2), TrainConfig(steps=3, gradient_accumulation=2)
    found = read_config(tiny_folder)
    wanted = TrainingSetup(quant, lora, 2, 16, accumulated=True)
    least = checkpointing_within(found, wanted, DeviceMemory(1 << 30, 0, False))
    assert least.checkpointing == "none" and least.needed is not None
    memory = DeviceMemory(least.needed + spare, 0, False)
    budgeted = config_within(memory, tiny_folder, quant, lora, config, rows=2, tokens=16)
    assert budgeted.predicted_peak == least.needed and budgeted.config.checkpointing == "none"
    assert (budgeted.config.steps, budgeted.config.gradient_accumulation) == (3, 2)
    with pytest.raises(ConfigError, match=r"even if every block is recomputed, .*not even two tokens fit"):
        config_within(DeviceMemory(1 << 10, 0, False), tiny_folder, quant, lora, config, rows=2, tokens=16)


def test_the_choice_is_one_sentence() -> None:
    memory = DeviceMemory(4 << 30, 100 << 20, False)
    none = BudgetedConfig(TrainConfig(checkpointing="none"), memory, 2, 9, 200 << 20)
    assert none.described() == (
        "2 x 9 tokens within 4,096.0 MiB: checkpointing none, predicted peak 200.0 MiB, 100.0 MiB of it besides tensors"
    )
    some = BudgetedConfig(TrainConfig(checkpointing=30 << 20), memory, 2, 9, 200 << 20)
    assert "checkpointing 30.0 MiB, predicted peak at most 200.0 MiB," in some.described()
