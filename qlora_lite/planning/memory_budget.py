"""Chooses the activation checkpointing of a training run by the memory that it may take; counts a base in shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_lite.checkpoints.load import MEMORY
from qlora_lite.checks import is_count, require
from qlora_lite.errors import ConfigError
from qlora_lite.lora.config import LoraConfig
from qlora_lite.memory.counters import resident_bytes
from qlora_lite.memory.report import readable_bytes
from qlora_lite.planning.forecast import TrainingSetup
from qlora_lite.planning.memory_plan import DeviceMemory, checkpointing_within
from qlora_lite.planning.rehearsal import fake_profiler, fake_tensors
from qlora_lite.planning.training_rehearsal import build_fake_model, read_config
from qlora_lite.progress.work import working
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.sharding.count import BaseInShares, shares_of_model
from qlora_lite.training.config import TrainConfig

# Typical of today's devices and drivers. The context cannot be known without the device, so plans say "assumed".
ACCELERATOR_CONTEXT = 512 << 20


@dataclass(frozen=True)
class BudgetedConfig:
    """A TrainConfig whose predicted peak fits into a memory.

    predicted_peak: bytes that the device must have, overhead included; an upper bound if `config.checkpointing` is a
    number of bytes.
    """

    config: TrainConfig
    memory: DeviceMemory
    rows: int
    tokens: int
    predicted_peak: int

    def described(self) -> str:
        """Returns one sentence with the batch, the memory, the checkpointing and the predicted peak."""
        checkpointing, bound = self.config.checkpointing, ""
        if isinstance(checkpointing, int):
            checkpointing, bound = readable_bytes(checkpointing), "at most "
        return (
            f"{self.rows} x {self.tokens} tokens within {readable_bytes(self.memory.size)}: "
            f"checkpointing {checkpointing}, predicted peak {bound}{readable_bytes(self.predicted_peak)}, "
            f"{readable_bytes(self.memory.overhead)} of it besides tensors"
        )


def device_memory(size: int, accelerator: bool | None = None, overhead: int | None = None) -> DeviceMemory:
    """Returns a memory of `size` bytes to plan for.

    accelerator: whether it is an accelerator's; None for the device that training uses on this machine.
    overhead: bytes taken besides the tensors of training. None assumes `ACCELERATOR_CONTEXT` for an accelerator, and
        measures the resident bytes of this process for a CPU.
    Raises ConfigError if they have to be measured and the system does not report them.
    """
    if accelerator is None:
        accelerator = torch.accelerator.is_available()
    if overhead is not None:
        return DeviceMemory(size, overhead, accelerator)
    if accelerator:
        return DeviceMemory(size, ACCELERATOR_CONTEXT, accelerator, "assumed")
    measured = resident_bytes()
    if measured is None:
        raise ConfigError("this system does not report how much memory a process takes; give the overhead (--overhead)")
    return DeviceMemory(size, measured, accelerator, "measured")


def config_within(
    memory: DeviceMemory,
    path_or_id: str | Path,
    quant: QuantConfig,
    lora: LoraConfig,
    config: TrainConfig,
    *,
    rows: int,
    tokens: int,
    text_only: bool = False,
    base: str = MEMORY,
) -> BudgetedConfig:
    """Returns `config` with the least recomputation for which batches `(rows, tokens)` fit into `memory`.

    The peak is predicted by `Forecaster` from the config of the checkpoint; no weight is read. The checkpointing of
    `config` is not looked at.
    Raises ConfigError, which names the nearest batch that fits, if recomputing every block is not enough, and
    RehearsalError if the model cannot be run on fake tensors.
    """
    accumulated = config.gradient_accumulation > 1
    setup = TrainingSetup(quant, lora, rows, tokens, config.optimizer, accumulated=accumulated)
    setup = replace(setup, text_only=text_only, base=base)
    with working("predicting the memory"):
        least = checkpointing_within(read_config(path_or_id), setup, memory)
    assert least.checkpointing is not None and least.needed is not None
    chosen = replace(config, checkpointing=least.checkpointing)
    return BudgetedConfig(chosen, memory, rows, tokens, least.needed)


def base_in_shares(
    model_config: Any, quant: QuantConfig, lora: LoraConfig, processes: int, text_only: bool = False
) -> BaseInShares:
    """Counts the bytes of the base of a model of this config (from `read_config`) in shares of so many processes.

    Raises ConfigError for fewer than two processes, and what `build_fake_model` raises.
    """
    require(is_count(processes, 2), "a base in shares needs at least 2 processes", processes)
    with fake_tensors(), fake_profiler() as profiler:
        model = build_fake_model(model_config, quant, lora, profiler, text_only=text_only)
        return shares_of_model(model, processes)
