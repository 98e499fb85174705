"""`qlora-lite inspect`: the contents of an adapter or a merged checkpoint, and the programs that accept it.

Exit status: 0 read, 1 not readable or not accepted by a program of `--require`, 2 wrong usage.
"""

from __future__ import annotations

import json as json_lines
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_lite.cli.options import Json, check_not_given
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
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter saved here or by peft, or of a checkpoint.")],
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="Program that must accept it, else exit status 1: vllm, llama.cpp, peft (adapters) or transformers-4 "
            "(checkpoints); repeatable."
        ),
    ] = None,
    max_lora_rank: Annotated[int, typer.Option(help="vLLM's setting of the same name: 8, 16, 32, 64, ...")] = 16,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub id; exit status 1 if the adapter was trained on another one."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the contents of an adapter, without a model, or of a checkpoint, and which programs accept it."""
    from qlora_lite.checkpoints.files import CONFIG_FILE
    from qlora_lite.lora.peft.options import CONFIG_FILE as ADAPTER_CONFIG

    required = require or []
    if (folder / CONFIG_FILE).is_file() and not (folder / ADAPTER_CONFIG).exists():
        check_not_given(ctx, "a checkpoint", ("max_lora_rank", "model"))
        found = _checkpoint(folder, required, json)
    else:
        found = _adapter(folder, required, max_lora_rank, model, json)
    if not all(found[name].accepted for name in required):
        raise typer.Exit(NOT_ACCEPTED)


def _check_programs(required: Sequence[str], programs: Sequence[str], what: str) -> None:
    """Raises BadParameter for a program that there are no rules for."""
    if unknown := sorted(set(required) - set(programs)):
        raise typer.BadParameter(f"must be {either(*programs)} for {what}; got {unknown[0]!r}", param_hint="--require")


def _checkpoint(folder: Path, required: Sequence[str], json: bool) -> dict[str, Compatibility]:
    """Prints what a checkpoint holds and which programs read it as the model that it is."""
    from qlora_lite.export.gguf.library import is_installed
    from qlora_lite.export.readers.checkpoint_folder import describe_checkpoint
    from qlora_lite.export.readers.rules import READERS, check_readers
    from qlora_lite.lora.peft.compatibility import LLAMA_CPP
    from qlora_lite.memory.report import readable_bytes

    _check_programs(required, READERS, "a checkpoint")
    described = describe_checkpoint(folder)
    programs = [name for name in READERS if name != LLAMA_CPP or name in required or is_installed()]
    found = check_readers(described, programs)
    packed = "" if described.packed_by is None else f", packed by {described.packed_by}"
    size = f"{len(described.tensors)} tensors, {readable_bytes(described.bytes)}"
    print(f"{folder}: {described.file.get('model_type')}, {size} in {', '.join(described.dtypes)}{packed}")
    for result in found.values():
        print("\n".join(_compatibility_lines(result)))
    if LLAMA_CPP not in programs:
        print(f"{LLAMA_CPP}: not checked, which needs the gguf package; run: pip install 'qlora-lite[gguf]'")
    if json:
        named = {name: result.to_json() for name, result in found.items()}
        print(json_lines.dumps({**described.to_json(), "verdicts": named}))
    return found


def _adapter(
    adapter: Path, required: Sequence[str], max_lora_rank: int, model: str | None, json: bool
) -> dict[str, Compatibility]:
    """Prints what an adapter holds and which programs accept it."""
    from rich.console import Console

    from qlora_lite.lora.peft.compatibility import PROGRAMS, check_compatibility
    from qlora_lite.lora.peft.describe import describe_adapter

    _check_programs(required, PROGRAMS, "an adapter")
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
    return found
