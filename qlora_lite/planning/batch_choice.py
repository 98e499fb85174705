"""Chooses the batch of a run that is proposed: rows, tokens, accumulation and checkpointing that fit into a memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_lite.errors import ConfigError
from qlora_lite.memory.report import readable_bytes
from qlora_lite.planning.forecast import Forecaster, TrainingSetup
from qlora_lite.planning.memory_plan import DeviceMemory, least_recomputation
from qlora_lite.planning.rehearsal import fake_tensors
from qlora_lite.planning.training_rehearsal import read_config
from qlora_lite.training.loop import check_batch_shape

# Shorter rows than these are not proposed, whatever fits.
FEWEST_TOKENS = 64


@dataclass(frozen=True)
class BatchChoice:
    """A batch that fits: `rows` of up to `tokens`, of which `gradient_accumulation` make a step.

    needed: predicted bytes of the device, at most.
    """

    rows: int
    tokens: int
    gradient_accumulation: int
    checkpointing: str | int
    needed: int


def choose_batch(path_or_id: str | Path, wanted: TrainingSetup, memory: DeviceMemory) -> BatchChoice:
    """Returns the batch nearest to the wanted one that fits, and for it the least recomputation.

    wanted: `rows` are the examples of a step, a power of two, and `tokens` the longest row. Rows are halved, and
    accumulated, until a batch fits with every block recomputed; then tokens are halved. No weight is read.
    Raises ConfigError if not even one row of `FEWEST_TOKENS` fits, and RehearsalError for a model that cannot be
    rehearsed.
    """
    model_config = read_config(path_or_id)
    check_batch_shape(model_config, wanted.rows, wanted.tokens)
    with fake_tensors(memory.accelerator):
        forecaster = Forecaster(model_config, memory.accelerator)
        needed = 0
        for setup in _smaller_and_smaller(wanted):
            needed = memory.needed(forecaster.forecast(setup))
            if needed <= memory.size:
                break
        else:
            raise ConfigError(
                f"one row of {setup.tokens} tokens needs {readable_bytes(needed)}, even if every block is recomputed, "
                f"and {readable_bytes(memory.size)} are given; give more memory, or name a smaller model"
            )
        least = least_recomputation(forecaster, setup, memory)
    assert least.checkpointing is not None and least.needed is not None
    return BatchChoice(setup.rows, setup.tokens, wanted.rows // setup.rows, least.checkpointing, least.needed)


def _smaller_and_smaller(wanted: TrainingSetup) -> Iterator[TrainingSetup]:
    """Yields the wanted setup with every block recomputed, then with fewer rows, then with fewer tokens."""
    rows, tokens = wanted.rows, wanted.tokens
    while True:
        yield replace(wanted, rows=rows, tokens=tokens, checkpointing="full", accumulated=rows < wanted.rows)
        if rows > 1:
            rows //= 2
        elif tokens > FEWEST_TOKENS:
            tokens = max(FEWEST_TOKENS, tokens // 2)
        else:
            return
