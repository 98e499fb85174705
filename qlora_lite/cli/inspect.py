"""`qlora-lite inspect`: the contents of an adapter, and the programs that accept it.

Exit status: 0 read, 1 not readable or not accepted by a program of `--require`, 2 wrong usage.
"""

from __future__ import annotations

import json as json_lines
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_lite.cli.options import Json

if TYPE_CHECKING:
    from rich.table import Table

    from qlora_lite.lora.peft.compatibility import Verdict
    from qlora_lite.lora.peft.describe import AdapterFacts


NOT_ACCEPTED = 1


def _joined(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _layer_table(facts: AdapterFacts) -> Table:
    from rich import box
    from rich.table import Table

    from qlora_lite.lora.peft.describe import group_json, grouped
    from qlora_lite.memory.report import readable_bytes

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("layers", "kind", "count", "rank", "alpha", "scaling", "parameters", "bytes"):
        table.add_column(column, justify="left" if column in ("layers", "kind") else "right")
    for group in grouped(facts.layers):
        line = group_json(group)
        numbers = [_joined(line[column]) for column in ("ranks", "alphas", "scalings")]
        sizes = f"{line['parameters']:,}", readable_bytes(line["bytes"])
        table.add_row(line["name"], line["kind"], str(line["layers"]), *numbers, *sizes)
    for key, size in facts.beside.items():
        table.add_row(key, "beside", "", "", "", "", "", readable_bytes(size))
    total = "all", "", str(len(facts.layers)), "", "", "", f"{facts.parameters:,}", readable_bytes(facts.bytes)
    table.add_row(*total)
    return table


def _verdict_lines(verdict: Verdict) -> list[str]:
    lines = [f"{verdict.program}: {'accepted' if verdict.accepted else 'not accepted'}"]
    lines += [f"  because of {reason}" for reason in verdict.reasons]
    return lines + [f"  note: {note}" for note in verdict.notes]


def _compared(adapter: Path, model: str) -> list[str]:
    from qlora_lite.checkpoints.base_identity import check_trained_on_checkpoint
    from qlora_lite.checkpoints.hub import checkpoint_folder

    return check_trained_on_checkpoint(adapter, checkpoint_folder(model))


def inspect(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter saved here or by peft.")],
    require: Annotated[
        list[str] | None,
        typer.Option(help="Program that must accept the adapter, else exit status 1: vllm or llama.cpp; repeatable."),
    ] = None,
    max_lora_rank: Annotated[int, typer.Option(help="vLLM's setting of the same name: 8, 16, 32, 64, ...")] = 16,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub id; exit status 1 if the adapter was trained on another one."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the contents of an adapter, without a model, and whether vLLM and llama.cpp accept it."""
    from rich.console import Console

    from qlora_lite.lora.peft.compatibility import LLAMA_CPP, VLLM, verdicts
    from qlora_lite.lora.peft.describe import adapter_facts

    if unknown := set(require or []) - {VLLM, LLAMA_CPP}:
        raise typer.BadParameter(f"must be {VLLM} or {LLAMA_CPP}; got {sorted(unknown)[0]!r}", param_hint="--require")
    facts = adapter_facts(adapter)
    compared = None if model is None else _compared(adapter, model)
    found = verdicts(facts, max_lora_rank)
    scaled = "alpha / sqrt(rank)" if facts.use_rslora else "alpha / rank"
    print(f"{adapter}: {facts.variant}, scaled by {scaled}, in {', '.join(facts.dtypes)}")
    print(f"base model: {facts.base or 'unknown'}")
    print(f"trained on: {'unknown' if facts.trained_on is None else facts.trained_on.described()}")
    if compared is not None:
        print(f"{model}: {'the same ' + ' and '.join(compared) if compared else 'nothing says whether it is the base'}")
    Console(width=120, highlight=False, markup=False).print(_layer_table(facts))
    for verdict in found.values():
        print("\n".join(_verdict_lines(verdict)))
    if json:
        named = {name: verdict.to_json() for name, verdict in found.items()}
        print(json_lines.dumps({**facts.to_json(), "same_as_model": compared, "verdicts": named}))
    if not all(found[name].accepted for name in require or []):
        raise typer.Exit(NOT_ACCEPTED)
