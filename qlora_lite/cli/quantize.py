"""`qlora-lite quantize`: writes a checkpoint with packed weights."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_lite.cli.data_options import SOURCES_HELP, input_paths, tokenizing_progress
from qlora_lite.cli.options import (
    Blocksize,
    DoubleQuant,
    EmbeddingFormat,
    IgnoreUnexpected,
    Json,
    MaxShardSize,
    Model,
    Output,
    Overwrite,
    PackedFormat,
    SkipModules,
    check_output,
    finish,
    shard_bytes,
    skipped,
    was_given,
)
from qlora_lite.errors import ConfigError
from qlora_lite.quantization.formats import DEFAULT_FORMAT, UNPACKED

if TYPE_CHECKING:
    from torch import Tensor

Text = list[dict[str, "Tensor"]]


def _text(model: str, sources: list[str], tokens: int) -> tuple[Text, Text]:
    """Returns batches of text to calibrate on, and others that are held out."""
    from qlora_lite.calibration.windows import text_windows
    from qlora_lite.checkpoints.hub import load_tokenizer
    from qlora_lite.data.tokenization import DataConfig, tokenize_sources

    config = DataConfig(learn="all", prompts_too=True)
    with tokenizing_progress() as show:
        examples = tokenize_sources(sources, load_tokenizer(model), config, cache=False, show=show).examples
    return text_windows(examples, tokens)


def quantize(
    ctx: typer.Context,
    model: Model,
    output: Output,
    format: PackedFormat = DEFAULT_FORMAT,
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = UNPACKED,
    skip_modules: SkipModules = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option("--calibrate", help=f"Choose the codes of nf4 or fp4 by text, not by rounding. {SOURCES_HELP}"),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of --calibrate that run through the model.")] = 8192,
    max_shard_size: MaxShardSize = "5GB",
    ignore_unexpected: IgnoreUnexpected = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a packed checkpoint that transformers loads as pre-quantized, and the other commands as --model."""
    from qlora_lite.calibration.from_checkpoint import calibrated_model, check_calibratable, unfinished_folder
    from qlora_lite.calibration.report import render
    from qlora_lite.checkpoints.load import load_quantized
    from qlora_lite.export.quantized import check_formats, save_quantized
    from qlora_lite.quantization.config import QuantConfig
    from qlora_lite.signals import deferred_signals

    quant = QuantConfig(
        format, blocksize, double_quant, embedding_format=embedding_format, skip_modules=skipped(skip_modules)
    )
    check_formats(quant)
    if calibrate is not None:
        check_calibratable(quant)
    if calibrate is None and was_given(ctx, "calibration_tokens"):
        raise ConfigError("--calibration-tokens says how much of --calibrate is read; give --calibrate too")
    shard = shard_bytes(max_shard_size)
    check_output(output, overwrite, model, *input_paths(calibrate or ()))
    with deferred_signals():
        if calibrate is None:
            loaded = load_quantized(model, quant, ignore_unexpected=ignore_unexpected)
        else:
            text, held_out = _text(model, calibrate, calibration_tokens)
            loaded = calibrated_model(
                model,
                text,
                quant,
                held_out=held_out,
                ignore_unexpected=ignore_unexpected,
                resume_folder=unfinished_folder(output),
            )
        files = save_quantized(loaded, output, max_shard_bytes=shard, overwrite=overwrite)
        if calibrate is not None:
            shutil.rmtree(unfinished_folder(output), ignore_errors=True)
    for line in loaded.load_report.in_words():
        print(line)
    size = sum((output / file).stat().st_size for file in files)
    figures: dict[str, object] = {"format": format, "bytes": size, "files": files, "output": str(output)}
    if calibrate is not None:
        print(render(loaded.calibration))
        figures |= loaded.calibration.figures()
    finish(figures, json)
