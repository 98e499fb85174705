"""`rehearse_steps`: the memory of training a model of which only the config is at hand, run on fake tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
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
from qlora_lite.training.config import TrainConfig
from qlora_lite.training.loop import check_batch_shape, train


def read_config(path_or_id: str | Path) -> Any:
    """The config of a checkpoint's folder, of a config file by itself, or of a hub id."""
    path = Path(path_or_id)
    if path.is_file() and path.suffix != ".json":
        raise CheckpointError(f"{path} is no config; name a config.json, or a folder that has one")
    return hub.read_config(path if path.is_file() else hub.checkpoint_folder(path_or_id))


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
) -> MemoryReport:
    """What `profile_steps` would measure of live tensors: phases load, forward, backward, optimizer.

    Runs the packing of `load_quantized`, `add_lora_` and `train`, with batches `(rows, tokens)`, on fake tensors.
    accelerator: as for `rehearse`. dtype: of what is not packed. RehearsalError for a model whose code cannot run on
    fake tensors; ConfigError, TargetError, CheckpointError as the real run would raise them.
    """
    found = read_config(path_or_id)
    check_batch_shape(found, rows, tokens)
    with rehearsal(accelerator) as profiler:
        model = build_fake_model(found, quant, lora, profiler, dtype)
        run_fake_training(model, profiler, config, rows, tokens)
    return rehearsed_report(profiler, accelerator)


def build_fake_model(
    found: Any, quant: QuantConfig, lora: LoraConfig, profiler: MemoryProfiler, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """A model of this config, packed, with adapters and without values; made in the profiler's phase `load`.

    Only within `fake_tensors`. Raises what `rehearse_steps` does.
    """
    # What the files hold; a model that is made of the config writes its own dtype into it.
    stored = getattr(found, "dtype", None) or dtype
    with no_dispatch():
        model: Any = hub.empty_model(found, dtype)
        architecture.tie(model)
    checkpoint = ShapeOnlyCheckpoint(model, quant, stored)
    with profiler.phase("load"):
        load_tensors_(model, checkpoint, dtype, torch.device("cpu"))
        # loftq reads weights to start A and B, which have the same size whatever they start with
        add_lora_(
            model,
            replace(lora, init_lora_weights="normal") if parse_init(lora.init_lora_weights)[0] == "loftq" else lora,
        )
    return model


def run_fake_training(model: Any, profiler: MemoryProfiler, config: TrainConfig, rows: int, tokens: int) -> None:
    """Trains an `build_fake_model` on batches `(rows, tokens)`; the profiler's phases are those of `train`.

    RehearsalError for a model whose code fails on fake tensors, or on a packed base.
    """
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    try:
        train(model, [{"input_ids": ids, "labels": ids}], config, profiler=profiler, progress=False)
    except QLoRAError:
        raise
    except Exception as error:  # any code may stand in a stranger's model
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise RehearsalError(
            f"a {type(model).__name__} cannot be rehearsed: what it allocates depends on values, or its code does not "
            f"run on fake tensors and a packed base ({type(error).__name__}: {first_line})"
        ) from error


def try_rehearse_steps(
    path_or_id: str | Path, quant: QuantConfig, lora: LoraConfig, config: TrainConfig, *, rows: int, tokens: int
) -> tuple[MemoryReport | None, str]:
    """`rehearse_steps` for the device that training uses here; without a report, a sentence says why there is none."""
    accelerator = torch.accelerator.is_available()
    try:
        return rehearse_steps(path_or_id, quant, lora, config, rows=rows, tokens=tokens, accelerator=accelerator), ""
    except RehearsalError as error:
        return None, f"not predicted: {error}"
