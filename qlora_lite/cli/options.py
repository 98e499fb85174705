"""What several commands have, each said once: options, checks of what is written, the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from qlora_lite import errors

Model = Annotated[str, typer.Option("--model", help="Folder of a transformers checkpoint, or a hub id.")]
Output = Annotated[Path, typer.Option("--output", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Take a base that the adapter was not trained on.")]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")]
Format = Annotated[str, typer.Option("--format", help="How the base is stored: nf4, fp4, int8 or none.")]
EmbeddingFormat = Annotated[str, typer.Option(help="int8 also packs embedding and head; none leaves them.")]
Blocksize = Annotated[int, typer.Option(help="Values per block of the 4-bit formats.")]
DoubleQuant = Annotated[bool, typer.Option(help="Pack the statistics of the 4-bit formats too.")]
Int8Activations = Annotated[bool, typer.Option(help="With int8, multiply in integers too: faster, less exact.")]
MaxShardSize = Annotated[str, typer.Option(help="Largest size of a tensor file: 5GB, 500MiB, ...")]
Rank = Annotated[int, typer.Option(help="Rank of the adapters.")]
Alpha = Annotated[float, typer.Option(help="The adapters' scale is alpha / rank.")]
RankStabilized = Annotated[bool, typer.Option("--use_rslora", help="Scale by alpha / sqrt(rank) instead.")]
Checkpointing = Annotated[str, typer.Option(help="full recomputes blocks, none keeps all, 300MiB what fits.")]


class StrictCommand(TyperCommand):
    """A command that refuses what would silently mean something else than it says.

    An option that is given twice, of which one would be left out; an empty text, which as a path is this folder.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param in order:
            name, several = param.opts[0], getattr(param, "multiple", False)
            if order.count(param) > 1 and not several:
                ctx.fail(f"{name} is given {order.count(param)} times; give it once")
            values = given[param.name] if several else [given[param.name]]
            if "" in values and param.default != "":
                ctx.fail(f"{name} must not be empty; leave it out, or give a value")
        return super().parse_args(ctx, args)


def listed(text: str) -> list[str]:
    """Names between commas; none in an empty text."""
    return [name.strip() for name in text.split(",")] if text.strip() else []


def listed_tokens(text: str) -> list[int]:
    """Token numbers between commas. ConfigError for what is none."""
    try:
        return [int(name) for name in listed(text)]
    except ValueError as error:
        raise errors.ConfigError(
            f"--trainable-token-indices must be token numbers with commas; got {text!r}"
        ) from error


def finish(figures: dict[str, Any], as_json: bool) -> None:
    """Ends a command: its figures as a JSON line, or for a person."""
    if as_json:
        print(json.dumps(figures))
        return
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        said = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{name.replace('_', ' '):<{width}}  {'-' if said is None else said}")


def check_output(folder: Path, overwrite: bool, *inputs: str | Path) -> None:
    """CheckpointError for a folder that must not, or cannot, be written, before anything is read."""
    from qlora_lite.checkpoints.atomic_folder import check_output_is_not_input, check_replaceable
    from qlora_lite.checkpoints.files import check_creatable

    check_creatable(folder)
    check_output_is_not_input(folder, *(Path(path) for path in inputs))
    for path in inputs:
        if Path(path).is_dir() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path)):
            raise errors.CheckpointError(f"the output {folder} lies inside the input {path}; name another folder")
    check_replaceable(folder, overwrite)


def shard_bytes(size: str) -> int:
    """Bytes of `--max-shard-size`. ConfigError for what is no size, or nothing."""
    from qlora_lite.checks import byte_count, require

    found = byte_count("--max-shard-size must be", size)
    require(found > 0, "--max-shard-size must be above 0", size)
    return found
