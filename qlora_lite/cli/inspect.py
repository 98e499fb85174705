"""`qlora-lite inspect`: the contents of an adapter, and the programs that accept it.

Exit status: 0 read, 1 not readable or not accepted by a program of `--require`, 2 wrong usage.
"""

from __future__ import annotations

import json as json_lines
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_lite.cli.options import Json
from qlora_lite.quantization.formats import either

if TYPE_CHECKING:
    from rich.table import Table

    from qlora_lite.lora.peft.compatibility import Compatibility
    from qlora_lite.lora.peft.describe import AdapterDescription


NOT_ACCEPTED = 1


def _joined(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _layer_table(description: AdapterDescription) -> Table:
    from rich import box
    from rich.table import Table

    from qlora_lite.lora.peft.describe import group_layers
    from qlora_lite.memory.report import readable_bytes

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("layers", "kind", "count", "rank", "alpha", "scaling", "parameters", "bytes"):
        table.add_column(column, justify="left" if column in ("layers", "kind") else "right")
    for group in group_layers(description.layers):
        numbers = [_joined(values) for values in (group.ranks, group.alphas, group.scalings)]
        sizes = f"{group.parameters:,}", readable_bytes(group.bytes)
        table.add_row(group.name, group.kind, str(group.layers), *numbers, *sizes)
    for key, size in description.auxiliary.items():
        table.add_row(key, "auxiliary", "", "", "", "", "", readable_bytes(size))
    total = f"{description.parameters:,}", readable_bytes(description.bytes)
    table.add_row("all", "", str(len(description.layers)), "", "", "", *total)
    return table


def _compatibility_lines(result: Compatibility) -> list[str]:
    lines = [f"{result.program}: {'accepted' if result.accepted else 'not accepted'}"]
    lines += [f"  because of {reason}" for reason in result.reasons]
    return lines + [f"  note: {note}" for note in result.notes]


def _compared(adapter: Path, model: str) -> list[str]:
    from qlora_lite.checkpoints.base_identity import check_trained_on_checkpoint
    from qlora_lite.checkpoints.hub import checkpoint_folder

    return check_trained_on_checkpoint(adapter, checkpoint_folder(model))


def inspect(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter saved here or by peft.")],
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="Program that must accept the adapter, else exit status 1: peft, vllm or llama.cpp; repeatable."
        ),
    ] = None,
    max_lora_rank: Annotated[int, typer.Option(help="vLLM's setting of the same name: 8, 16, 32, 64, ...")] = 16,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub id; exit status 1 if the adapter was trained on another one."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the contents of an adapter, without a model, and whether peft, vLLM and llama.cpp accept it."""
    from rich.console import Console

    from qlora_lite.lora.peft.compatibility import PROGRAMS, check_compatibility
    from qlora_lite.lora.peft.describe import describe_adapter

    if unknown := sorted(set(require or []) - set(PROGRAMS)):
        raise typer.BadParameter(f"must be {either(*PROGRAMS)}; got {unknown[0]!r}", param_hint="--require")
    description = describe_adapter(adapter)
    compared = None if model is None else _compared(adapter, model)
    found = check_compatibility(description, max_lora_rank)
    scaled = "alpha / sqrt(rank)" if description.use_rslora else "alpha / rank"
    print(f"{adapter}: {description.variant}, scaled by {scaled}, in {', '.join(description.dtypes)}")
    print(f"base model: {description.base or 'unknown'}")
    print(f"trained on: {'unknown' if description.trained_on is None else description.trained_on.described()}")
    if compared is not None:
        print(f"{model}: {'the same ' + ' and '.join(compared) if compared else 'nothing says whether it is the base'}")
    Console(width=120, highlight=False, markup=False).print(_layer_table(description))
    for result in found.values():
        print("\n".join(_compatibility_lines(result)))
    if json:
        named = {name: result.to_json() for name, result in found.items()}
        print(json_lines.dumps({**description.to_json(), "same_as_model": compared, "verdicts": named}))
    if not all(found[name].accepted for name in require or []):
        raise typer.Exit(NOT_ACCEPTED)
