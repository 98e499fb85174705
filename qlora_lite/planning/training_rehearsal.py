"""`rehearse_steps`: the memory of training a model from its config alone, by running the training on fake tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._mode_utils import no_dispatch

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.load import load_tensors_
from qlora_lite.errors import CheckpointError, QLoRAError, RehearsalError
from qlora_lite.lora.adapters import add_lora_
from qlora_lite.lora.config import LoraConfig, parse_init
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.memory.report import MemoryReport
from qlora_lite.planning.rehearsal import rehearsal, rehearsed_report
from qlora_lite.planning.shape_only_checkpoint import ShapeOnlyCheckpoint
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.surgery import leave_out_towers_
from qlora_lite.training.config import TrainConfig
from qlora_lite.training.loop import check_batch_shape, train


def read_config(path_or_id: str | Path) -> Any:
    """Returns the transformers config of a checkpoint folder, a config file, or a model id on the hub.

    Raises CheckpointError for a file that is not a config.
    """
    path = Path(path_or_id)
    if path.is_file() and path.suffix != ".json":
        raise CheckpointError(f"{path} is not a config; name a config.json, or a folder that contains one")
    return hub.read_config(path if path.is_file() else hub.checkpoint_folder(path_or_id, weights=False))


# The first step measures what a number of bytes allows to keep, the second one has the optimizer's states.
REHEARSED_STEPS = 3


def rehearse_steps(
    path_or_id: str | Path,
    quant: QuantConfig,
    lora: LoraConfig,
    config: TrainConfig,
    *,
    rows: int,
    tokens: int,
    accelerator: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    text_only: bool = False,
) -> MemoryReport:
    """Predicts the live tensor bytes that `profile_steps` measures: phases load, forward, backward, optimizer.

    Runs the packing of `load_quantized`, `add_lora_`, and `train` with batches of shape `(rows, tokens)`, on fake
    tensors. No weight is read. Of a longer run the first steps are rehearsed (`REHEARSED_STEPS`), since the others take
    the same memory, and no evaluation, which takes less.

    Args:
        accelerator: predict for a CUDA device, as `rehearse` does.
        dtype: of weights that are not packed.
        text_only: as in `load_quantized`.

    Raises RehearsalError for a model whose code cannot run on fake tensors, and ConfigError, TargetError and
    CheckpointError where the real run would.
    """
    model_config = read_config(path_or_id)
    check_batch_shape(model_config, rows, tokens)
    with rehearsal(accelerator) as profiler:
        model = build_fake_model(model_config, quant, lora, profiler, dtype, text_only)
        run_fake_training(model, profiler, _first_steps(config), rows, tokens)
    return rehearsed_report(profiler, accelerator)


def _first_steps(config: TrainConfig) -> TrainConfig:
    config = config.steps_alone()
    if config.steps <= REHEARSED_STEPS:
        return config
    return replace(config, steps=REHEARSED_STEPS, warmup_steps=0, warmup_ratio=0.0)


def build_fake_model(
    model_config: Any,
    quant: QuantConfig,
    lora: LoraConfig,
    profiler: MemoryProfiler,
    dtype: torch.dtype = torch.bfloat16,
    text_only: bool = False,
) -> nn.Module:
    """Returns a packed model with adapters on fake tensors, built in the profiler's phase `load`.

    To be called within `fake_tensors`. Raises what `rehearse_steps` raises.
    """
    # The dtype on disk. It must be read first, since building a model writes the model's dtype into the config.
    stored = getattr(model_config, "dtype", None) or dtype
    with no_dispatch():
        model: nn.Module = hub.empty_model(model_config, dtype)
        architecture.tie(model)
        if text_only:
            leave_out_towers_(model)
    checkpoint = ShapeOnlyCheckpoint(model, quant, stored)
    # LoftQ reads weights to initialize A and B, whose sizes do not depend on the initialization.
    if parse_init(lora.init_lora_weights)[0] == "loftq":
        lora = replace(lora, init_lora_weights="normal")
    with profiler.phase("load"):
        load_tensors_(model, checkpoint, dtype, torch.device("cpu"))
        add_lora_(model, lora)
    return model


def run_fake_training(model: nn.Module, profiler: MemoryProfiler, config: TrainConfig, rows: int, tokens: int) -> None:
    """Trains a model from `build_fake_model` on batches of shape `(rows, tokens)`, in the phases of `train`.

    Raises RehearsalError for a model whose code fails on fake tensors or on a packed base.
    """
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    try:
        train(model, [{"input_ids": ids, "labels": ids}], config, profiler=profiler, progress=False)
    except QLoRAError:
        raise
    except Exception as error:  # the code of any model may raise anything
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise RehearsalError(
            f"a {type(model).__name__} cannot be rehearsed: its allocations depend on values of tensors, or its code "
            f"does not run on fake tensors and a packed base ({type(error).__name__}: {first_line})"
        ) from error


def try_rehearse_steps(
    path_or_id: str | Path,
    quant: QuantConfig,
    lora: LoraConfig,
    config: TrainConfig,
    *,
    rows: int,
    tokens: int,
    text_only: bool = False,
) -> tuple[MemoryReport | None, str]:
    """Returns the report of `rehearse_steps` for the device that training uses on this machine, and an empty string.

    If the model cannot be rehearsed, returns None and a sentence with the reason.
    """
    device = torch.accelerator.is_available()
    try:
        report = rehearse_steps(
            path_or_id, quant, lora, config, rows=rows, tokens=tokens, accelerator=device, text_only=text_only
        )
        return report, ""
    except RehearsalError as error:
        return None, f"not predicted: {error}"
