"""Options that several commands share, checks of output folders, and the last lines of a command."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from qlora_lite import errors
from qlora_lite.quantization.formats import FORMATS, UNPACKED, either, embedding_formats, formats_where

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True)
class InFile:
    """How a configuration file writes an option (cli/configuration/), where its type alone does not say it.

    words: the texts that mean something, or where they are: `module:NAME`, imported when they are needed.
    others: what other texts are besides the words; None if there are no others. number: the texts are also numbers of
    this type. names: a list stands for the texts with commas between them. pairs: a mapping stands for KEY=NAME.
    path: the text is a path if there is something at it.
    """

    words: tuple[str, ...] | str = ()
    others: str | None = None
    number: type[int] | type[float] | None = None
    names: bool = False
    pairs: bool = False
    path: bool = False


DIGITS = 5  # of a figure for a reader

CHOICE_OF_NAMES = InFile(others="names, in a list or with commas between them", names=True)

Model = Annotated[
    str,
    typer.Option("--model", help="Folder of a transformers checkpoint, or an id on the hub."),
    InFile(path=True),
]
Output = Annotated[Path, typer.Option("--output", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the contents of the output folder.")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Accept a base that the adapter was not trained on.")]
IgnoreUnexpected = Annotated[
    bool,
    typer.Option(
        "--ignore-unexpected/--no-ignore-unexpected",
        help="Pass over tensors of the checkpoint that the model has no place for, and list them.",
    ),
]
BaseIn = Annotated[
    str,
    typer.Option(
        "--base-in",
        help="Where the packed base is held: memory, or disk, from which it is read block by block, for models larger "
        "than the memory. The results are the same.",
    ),
    InFile(words="qlora_lite.checkpoints.load:BASES"),
]
TextOnly = Annotated[
    bool,
    typer.Option(
        "--text-only/--no-text-only",
        help="Do not load the vision tower of a vision-language model: train on text alone.",
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="What the model is for: causal-lm, seq2seq-lm, sequence-classification (also regression and rewards), "
        "token-classification, masked-lm, embedding, or a class of transformers. Default: what the checkpoint's config "
        "says.",
    ),
    InFile(words="qlora_lite.tasks:TASKS", others="a class of transformers"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")]
_FORMATS = [f"{row.name} ({row.help})" for row in FORMATS.values()]
_EMBEDDING_FORMATS = either(*embedding_formats())
_INTEGER_FORMATS = either(*formats_where(lambda row: row.integer_product))
Format = Annotated[
    str,
    typer.Option("--format", help=f"Format of the base weights: {either(*_FORMATS, UNPACKED)}."),
    InFile(words=(*FORMATS, UNPACKED)),
]
_WRITABLE_FORMATS = [
    f"{name} ({FORMATS[name].help})" for name in formats_where(lambda row: row.bitsandbytes is not None)
]
PackedFormat = Annotated[
    str, typer.Option("--format", help=f"Format of the linear layers: {either(*_WRITABLE_FORMATS)}.")
]
EmbeddingFormat = Annotated[
    str,
    typer.Option(
        help=f"Format of input embedding and output head: {_EMBEDDING_FORMATS}, or none to leave them unpacked."
    ),
    InFile(words=(*embedding_formats(), UNPACKED)),
]
SkipModules = Annotated[
    str | None,
    typer.Option(
        "--skip-modules",
        help="Linear layers and experts modules to leave unpacked: last parts of their names, separated by commas. "
        "Default: the output head.",
    ),
    CHOICE_OF_NAMES,
]
Blocksize = Annotated[int, typer.Option(help="Values per block of the 4-bit formats.")]
DoubleQuant = Annotated[bool, typer.Option(help="Quantize the block statistics of the 4-bit formats too.")]
Int8Activations = Annotated[
    bool, typer.Option(help=f"With format {_INTEGER_FORMATS}, multiply in integers (LLM.int8()): faster, less exact.")
]
MaxShardSize = Annotated[str, typer.Option(help="Largest size of one tensor file, as 5GB or 500MiB.")]
Rank = Annotated[int, typer.Option(help="Rank of the adapters.")]
Alpha = Annotated[float, typer.Option(help="The adapters are scaled by alpha / rank.")]
UseRslora = Annotated[
    bool, typer.Option("--use-rslora/--no-use-rslora", help="Scale the adapters by alpha / sqrt(rank) instead.")
]
Optimizer = Annotated[
    str,
    typer.Option(help="adamw (32-bit states) or adamw8bit (8-bit states)."),
    InFile(words="qlora_lite.training.config:OPTIMIZERS"),
]
Checkpointing = Annotated[
    str,
    typer.Option(
        help="Activation checkpointing: full recomputes all blocks in backward, none recomputes no block, and a size "
        "such as 300MiB limits the bytes above those of the model."
    ),
]


class StrictCommand(TyperCommand):
    """A command that refuses an option given twice and an empty value.

    Of an option given twice, typer would use the last one. An empty path would mean the current folder.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # typer itself has no public name for ctx's class
        given, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param in order:
            name, repeated = param.opts[0], getattr(param, "multiple", False)
            if order.count(param) > 1 and not repeated:
                ctx.fail(f"{name} is given {order.count(param)} times; give it once")
            values = given[param.name] if repeated or param.nargs == -1 else [given[param.name]]
            if "" in (values or ()) and param.default != "":
                ctx.fail(f"{name} must not be empty; leave it out, or give a value")
        return super().parse_args(ctx, args)


def settings(kind: Callable[..., Settings], options: Mapping[str, object], **parsed: object) -> Settings:
    """Returns an instance of the dataclass `kind`, made of the options that have the names of its fields.

    parsed: fields whose option is text that was parsed before.
    """
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in options.items() if name in names} | parsed)


def listed(text: str) -> list[str]:
    """Returns the names in a text of names separated by commas; an empty text has none."""
    return [name.strip() for name in text.split(",")] if text.strip() else []


def targets_named(option: str, text: str) -> str | list[str]:
    """Returns names separated by commas as a list, and the regular expression after `re:` as text.

    `all-linear` and `all-linear-with-towers` stay as they are. Raises ConfigError for an empty expression.
    """
    if text in ("all-linear", "all-linear-with-towers"):
        return text
    kind, colon, expression = text.partition(":")
    if (kind, colon) != ("re", ":"):
        return listed(text)
    if not expression:
        raise errors.ConfigError(f"{option} re: must be followed by a regular expression for the whole name of a layer")
    return expression


def number_or_word(option: str, text: str, word: str, number: Callable[[str], float]) -> float | None:
    """Returns None for the word, and else the number in the text. Raises ConfigError for other texts.

    number: int or float.
    """
    if text == word:
        return None
    try:
        return number(text)
    except ValueError as error:
        raise errors.ConfigError(f"{option} must be a number, or {word}; got {text[:40]!r}") from error


def skipped(text: str | None) -> tuple[str, ...] | None:
    """Returns the names of `--skip-modules`; None if the option is not given."""
    return None if text is None else tuple(listed(text))


def listed_tokens(text: str) -> list[int]:
    """Returns the token ids in a text of ids separated by commas. Raises ConfigError for anything else."""
    try:
        return [int(name) for name in listed(text)]
    except ValueError as error:
        raise errors.ConfigError(
            f"--trainable-token-indices must be token ids separated by commas; got {text!r}"
        ) from error


def finish(figures: Mapping[str, object], as_json: bool) -> None:
    """Prints the figures of a command, as one JSON line or, rounded for a reader, as one line for each."""
    if as_json:
        print(json.dumps(figures))
        return
    shown = dict(_for_reader(name, value) for name, value in figures.items())
    width = max(map(len, shown))
    for name, text in shown.items():
        print(f"{name:<{width}}  {text}")


def _for_reader(name: str, value: object) -> tuple[str, str]:
    """Returns a figure as text: `("peak", "916.1 MiB")` for `peak_bytes`, which is not a round number."""
    words = name.replace("_", " ")
    if isinstance(value, int) and name.endswith("_bytes"):
        from qlora_lite.memory.report import readable_bytes

        return words.removesuffix(" bytes"), readable_bytes(value)
    if isinstance(value, float):
        return words, f"{value:.{DIGITS}g}"
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value)) or None
    return words, "-" if value is None else str(value)


def check_output(folder: Path, overwrite: bool, *inputs: str | Path) -> None:
    """Raises CheckpointError if the folder cannot or must not be written, before any input is read."""
    from qlora_lite.checkpoints.atomic_folder import check_output_is_not_input, check_replaceable
    from qlora_lite.checkpoints.files import check_creatable

    check_creatable(folder)
    check_output_is_not_input(folder, *(Path(path) for path in inputs))
    for path in inputs:
        if Path(path).is_dir() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path)):
            raise errors.CheckpointError(f"the output {folder} lies inside the input {path}; name another folder")
    check_replaceable(folder, overwrite)


def was_given(ctx: typer.Context, name: str) -> bool:
    """Whether a parameter stands on the command line, or in the configuration file."""
    return getattr(ctx.get_parameter_source(name), "name", None) in ("COMMANDLINE", "DEFAULT_MAP")


def check_not_given(ctx: typer.Context, option: str, names: Iterable[str]) -> None:
    """Raises ConfigError, listing them, if parameters that have no effect together with `option` were given."""
    given = [name for name in names if was_given(ctx, name)]
    if given:
        shown = errors.listing(f"--{name.replace('_', '-')}" for name in given)
        raise errors.ConfigError(f"{shown} and {option} cannot be given together; leave one out")


def shard_bytes(size: str) -> int:
    """Returns the bytes of `--max-shard-size`. Raises ConfigError if it is not a size above 0."""
    from qlora_lite.checks import byte_count, require

    found = byte_count("--max-shard-size must be", size)
    require(found > 0, "--max-shard-size must be above 0", size)
    return found
