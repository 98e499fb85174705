"""The command `plan`: does it fit, and what would?

Exit status: 0 it fits, 3 it does not, 1 that is not known (the model cannot be rehearsed) or the command failed,
2 wrong usage.
"""

from __future__ import annotations

import json as json_lines
from typing import Annotated, Any

import typer

DOES_NOT_FIT = 3
NOT_KNOWN = 1
# Typical of today's devices and drivers; it cannot be known without the device, so the output says that it is assumed.
CONTEXT = "512MiB"


def memory_of(size: str, device: str, beside: str | None, option: str = "--memory") -> Any:
    """The memory to plan for. ConfigError for sizes or a device that are none."""
    from qlora_lite.checks import byte_count
    from qlora_lite.errors import ConfigError
    from qlora_lite.memory.measure import resident_bytes
    from qlora_lite.planning.memory_plan import Memory

    total = byte_count(f"{option} must be", size)
    if device not in ("accelerator", "cpu"):
        raise ConfigError(f"--device must be accelerator or cpu; got {device!r}")
    on_accelerator = device == "accelerator"
    if beside is not None:
        return Memory(total, byte_count("--beside must be", beside), on_accelerator)
    if on_accelerator:
        return Memory(total, byte_count("--beside must be", CONTEXT), on_accelerator, "assumed")
    measured = resident_bytes()
    if measured is None:
        raise ConfigError("this system does not say how much a process takes; give it with --beside")
    return Memory(total, measured, on_accelerator, "measured")


def chosen_checkpointing(budget: str | None, asked: str | None, model: str, wanted: Any) -> tuple[Any, int | None]:
    """The dial to train with, and the memory that is predicted for it: None without a budget.

    wanted: how to train apart from that. ConfigError if both a budget and a dial are given, or nothing fits.
    """
    import torch

    from qlora_lite.errors import ConfigError
    from qlora_lite.memory.report import readable_bytes
    from qlora_lite.planning.memory_plan import checkpointing_within
    from qlora_lite.planning.training_rehearsal import read_config
    from qlora_lite.training.config import checkpointing_named

    if budget is None:
        return checkpointing_named(asked or "full"), None
    if asked is not None:
        raise ConfigError("--memory-budget chooses the checkpointing itself; leave out one of it and --checkpointing")
    memory = memory_of(budget, "accelerator" if torch.accelerator.is_available() else "cpu", None, "--memory-budget")
    least = checkpointing_within(read_config(model), wanted, memory)
    dial, needed = least.checkpointing, least.needed or 0
    most, said = ("at most ", readable_bytes(dial)) if isinstance(dial, int) else ("", dial)
    print(
        f"{wanted.rows} x {wanted.tokens} tokens within {readable_bytes(memory.size)}: checkpointing {said}, "
        f"predicted peak {most}{readable_bytes(needed)}, {readable_bytes(memory.beside)} of it beside tensors"
    )
    return dial, needed


def plan(
    model: Annotated[str, typer.Option("--model", help="Folder of a checkpoint, a config.json, or a hub id.")],
    memory: Annotated[str, typer.Option("--memory", help="What the device has: 24GiB, ...")],
    device: Annotated[str, typer.Option(help="accelerator or cpu.")] = "accelerator",
    beside: Annotated[
        str | None,
        typer.Option(help="Taken beside tensors: the device's context (512MiB assumed), or the rest of the process."),
    ] = None,
    format: Annotated[str, typer.Option("--format", help="How the base is stored: nf4, fp4, int8 or none.")] = "nf4",
    double_quant: Annotated[bool, typer.Option(help="Pack the statistics of the 4-bit formats too.")] = True,
    embedding_format: Annotated[str, typer.Option(help="int8 also packs embedding and head.")] = "none",
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    optimizer: Annotated[str, typer.Option(help="adamw or adamw8bit.")] = "adamw",
    checkpointing: Annotated[
        str, typer.Option(help="full recomputes blocks, none keeps all, 300MiB what fits.")
    ] = "full",
    rows: Annotated[int, typer.Option(help="Rows of the wanted batch.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of a row of it.")] = 512,
    seq: Annotated[
        list[int] | None, typer.Option(help="Look for the largest batch of rows of so many tokens; repeatable.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")] = False,
) -> None:
    """Predict from a config whether training fits into a memory, and the largest batches; exit status 3 if not."""
    from qlora_lite.lora.config import LoraConfig
    from qlora_lite.planning.forecast import Wanted
    from qlora_lite.planning.memory_plan import plan as make_plan
    from qlora_lite.planning.plan_report import render_plan
    from qlora_lite.planning.training_rehearsal import read_config
    from qlora_lite.quantization.config import QuantConfig
    from qlora_lite.signals import stoppable
    from qlora_lite.training.config import TrainConfig, checkpointing_named

    quant = QuantConfig(format, double_quant=double_quant, embedding_format=embedding_format)
    dial = checkpointing_named(checkpointing)
    TrainConfig(optimizer=optimizer, checkpointing=dial)
    wanted = Wanted(quant, LoraConfig(rank, 2 * rank), rows, tokens, optimizer, dial)
    with stoppable():
        made = make_plan(read_config(model), wanted, memory_of(memory, device, beside), seq or None)
    print(render_plan(made), end="")
    if json:
        print(json_lines.dumps(made.to_json()))
    if not made.fits:
        raise typer.Exit(DOES_NOT_FIT if made.fits is False else NOT_KNOWN)
