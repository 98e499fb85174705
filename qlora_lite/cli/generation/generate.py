"""`qlora-lite generate`: answers the prompts of files, in batches, into one JSONL file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_lite.cli.data_options import Fields, Limit, SkipBad, fields_named, input_paths
from qlora_lite.cli.generation.talkers import (
    DecodeCopies,
    MaxNewTokens,
    Temperature,
    TopK,
    TopP,
    generation_settings,
    held_copies,
    load_talker,
)
from qlora_lite.cli.options import (
    AnyBase,
    BaseIn,
    Blocksize,
    DoubleQuant,
    EmbeddingFormat,
    Format,
    IgnoreUnexpected,
    Int8Activations,
    Json,
    Model,
    SkipModules,
    TextOnly,
    finish,
    settings,
    skipped,
)
from qlora_lite.errors import ConfigError
from qlora_lite.progress.work import working
from qlora_lite.quantization.formats import DEFAULT_FORMAT, UNPACKED

if TYPE_CHECKING:
    from qlora_lite.generation.prompts import Prompts
    from qlora_lite.generation.record_prompts import PromptSet
    from qlora_lite.generation.settings import GenerationSettings


def _check(options: Mapping[str, Any]) -> None:
    """Raises ConfigError or CheckpointError, before any work, for an output that cannot be written, and the like."""
    from qlora_lite.checkpoints.atomic_folder import check_output_is_not_input
    from qlora_lite.checks import is_count, require
    from qlora_lite.generation.answer_file import check_answer_file

    if options["compare"] and options["adapter"] is None:
        raise ConfigError("--compare sets base and adapter side by side, so it needs --adapter")
    require(is_count(options["batch_size"], 1), "--batch-size must be at least 1", options["batch_size"])
    check_answer_file(options["output"], options["overwrite"])
    check_output_is_not_input(options["output"], *input_paths(options["prompts"]))


def _asked(options: Mapping[str, Any], made: GenerationSettings) -> tuple[Prompts, PromptSet]:
    """Reads the prompts. They hold the date that an earlier, unfinished run wrote."""
    from qlora_lite.checkpoints.hub import checkpoint_folder, load_tokenizer, read_config
    from qlora_lite.generation.answer_journal import run_date
    from qlora_lite.generation.prompts import Prompts
    from qlora_lite.generation.record_prompts import Room, read_prompts
    from qlora_lite.positions import longest_sequence

    prompts = Prompts(load_tokenizer(options["model"]), run_date(options["output"]))
    positions = longest_sequence(read_config(checkpoint_folder(options["model"], weights=False)))
    room = Room(positions, made.max_new_tokens)
    chosen = fields_named(options["field"]), options["limit"], options["skip_bad"]
    return prompts, read_prompts(options["prompts"], prompts, room, *chosen)


def generate(
    ctx: typer.Context,
    model: Model,
    prompts: Annotated[
        list[str],
        typer.Option(
            "--prompts",
            help="Prompts: a file of records with messages, a prompt or a text (JSONL, JSON, CSV, TSV, parquet, Arrow, "
            "also of gzip or zstd), a .txt file with a prompt in each line, a folder, or name:split of a data set on "
            "the hub. Several are joined. An answer that a record has is what is expected, and is not shown.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="File to write: answers.jsonl.")],
    adapter: Annotated[str | None, typer.Option("--adapter", help="Folder of an adapter.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Write the answer of the base, without the adapter, beside each.")
    ] = False,
    format: Format = DEFAULT_FORMAT,
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = UNPACKED,
    skip_modules: SkipModules = None,
    int8_activations: Int8Activations = False,
    batch_size: Annotated[int, typer.Option(help="Prompts that are answered at once.")] = 8,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Annotated[int | None, typer.Option(help="Seed of drawn tokens. Default: 0.")] = None,
    field: Fields = None,
    limit: Limit = None,
    skip_bad: SkipBad = 0,
    decode_copies: DecodeCopies = False,
    any_base: AnyBase = False,
    ignore_unexpected: IgnoreUnexpected = False,
    text_only: TextOnly = False,
    base_in: BaseIn = "memory",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    json: Json = False,
) -> None:
    """Answer the prompts of files in batches; the same command goes on with what a killed one left."""
    from dataclasses import asdict, replace

    from qlora_lite.generation.answer_file import write_answers
    from qlora_lite.generation.settings import draws
    from qlora_lite.quantization.config import QuantConfig

    made = generation_settings(ctx.params, model)
    quant = settings(QuantConfig, ctx.params, skip_modules=skipped(skip_modules))
    _check(ctx.params)
    writer, asked = _asked(ctx.params, made)
    talker = load_talker(ctx.params)
    if draws(talker.model.generation_config, made) and made.seed is None:
        made = replace(made, seed=0)  # so that a run that goes on draws what an undisturbed one would
    began = time.perf_counter()
    rounding = {"decode_copies": True} if decode_copies else {}  # a run that goes on has to round as it did
    with held_copies(talker.model, decode_copies), working("answering", len(asked.prompts), "prompts") as work:
        done = write_answers(
            talker.model,
            writer,
            asked,
            output,
            made,
            batch_size=batch_size,
            compare=compare,
            overwrite=overwrite,
            notes=asdict(quant) | rounding,
            on_answers=work.reach,
        )
    figures = {
        "prompts": done.prompts,
        "bad_records_skipped": asked.skipped,
        "answered_before": done.resumed,
        "new_tokens": done.new_tokens,
        "seconds": round(time.perf_counter() - began, 1),
        "output": str(output),
    }
    finish(figures, json)
