"""`qlora-lite plan`: predicts whether training fits into a memory, and what would make it fit.

Exit status: 0 it fits, 3 it does not fit, 1 the prediction is not possible (the model cannot be run on fake tensors)
or the command failed, 2 wrong usage.
"""

from __future__ import annotations

import json as json_lines
from dataclasses import asdict, replace
from typing import Annotated

import typer

from qlora_lite.cli.options import (
    BaseIn,
    Checkpointing,
    DoubleQuant,
    EmbeddingFormat,
    Format,
    Json,
    Optimizer,
    Rank,
    SkipModules,
    TextOnly,
    skipped,
)
from qlora_lite.quantization.formats import DEFAULT_FORMAT, UNPACKED

DOES_NOT_FIT = 3
NOT_KNOWN = 1


def plan(
    model: Annotated[str, typer.Option("--model", help="Folder of a checkpoint, a config.json, or an id on the hub.")],
    memory: Annotated[str, typer.Option("--memory", help="Memory of the device, as 24GiB.")],
    device: Annotated[str, typer.Option(help="accelerator or cpu.")] = "accelerator",
    overhead: Annotated[
        str | None,
        typer.Option(
            help="Memory taken besides the tensors of training, as 512MiB: the device's context and other processes. "
            "Default: 512MiB on an accelerator; on a CPU, what this process takes before it loads a model."
        ),
    ] = None,
    format: Format = DEFAULT_FORMAT,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = UNPACKED,
    skip_modules: SkipModules = None,
    rank: Rank = 16,
    optimizer: Optimizer = "adamw",
    checkpointing: Checkpointing = "full",
    rows: Annotated[int, typer.Option(help="Rows of a batch.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    seq: Annotated[
        list[int] | None,
        typer.Option(help="Also find the largest batch whose rows have this many tokens; repeatable."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Plan for one of so many processes that hold the base in shares (train --shard).")
    ] = None,
    text_only: TextOnly = False,
    base_in: BaseIn = "memory",
    json: Json = False,
) -> None:
    """Predict from a config whether training fits into a memory, and the largest batches; exit status 3 if not."""
    from qlora_lite.checkpoints.load import DISK, check_base
    from qlora_lite.checks import byte_count
    from qlora_lite.errors import ConfigError
    from qlora_lite.lora.config import LoraConfig
    from qlora_lite.planning.forecast import TrainingSetup
    from qlora_lite.planning.memory_budget import base_in_shares, device_memory
    from qlora_lite.planning.memory_plan import plan as make_plan
    from qlora_lite.planning.plan_report import render_plan, render_shares
    from qlora_lite.planning.training_rehearsal import read_config
    from qlora_lite.progress.work import working
    from qlora_lite.quantization.config import QuantConfig
    from qlora_lite.signals import deferred_signals
    from qlora_lite.training.config import TrainConfig, checkpointing_named

    quant = QuantConfig(
        format, double_quant=double_quant, embedding_format=embedding_format, skip_modules=skipped(skip_modules)
    )
    config = TrainConfig(optimizer=optimizer, checkpointing=checkpointing_named(checkpointing))
    lora = LoraConfig(rank, 2 * rank)
    check_base(base_in)
    shape = rows, tokens, optimizer, config.checkpointing
    wanted = TrainingSetup(quant, lora, *shape, text_only=text_only, base=base_in)
    size = byte_count("--memory must be", memory)
    if device not in ("accelerator", "cpu"):
        raise ConfigError(f"--device must be accelerator or cpu; got {device!r}")
    if processes is not None and base_in == DISK:
        raise ConfigError("--processes plans a base in shares, which is held in memory; give it or --base-in, not both")
    taken = None if overhead is None else byte_count("--overhead must be", overhead)
    with deferred_signals(), working("predicting the memory"):
        found, on_device = read_config(model), device_memory(size, device == "accelerator", taken)
        shares = None if processes is None else base_in_shares(found, quant, lora, processes, text_only)
        made = make_plan(
            found, wanted, on_device if shares is None else replace(on_device, in_shares=shares.saved), seq or None
        )
    print(("" if shares is None else render_shares(shares)) + render_plan(made), end="")
    if json:
        print(json_lines.dumps(made.to_json() | ({} if shares is None else {"shares": asdict(shares)})))
    if not made.fits:
        raise typer.Exit(DOES_NOT_FIT if made.fits is False else NOT_KNOWN)
