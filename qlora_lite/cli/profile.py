"""`qlora-lite profile`: measures the memory of two training steps and compares it with the prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_lite.cli.options import (
    Checkpointing,
    EmbeddingFormat,
    Format,
    IgnoreUnexpected,
    Int8Activations,
    Json,
    Model,
    Rank,
    SkipModules,
    TextOnly,
    skipped,
)
from qlora_lite.quantization.formats import DEFAULT_FORMAT, UNPACKED


def profile(
    model: Model,
    format: Format = DEFAULT_FORMAT,
    embedding_format: EmbeddingFormat = UNPACKED,
    skip_modules: SkipModules = None,
    int8_activations: Int8Activations = False,
    rank: Rank = 16,
    rows: Annotated[int, typer.Option(help="Rows of the batch.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    checkpointing: Checkpointing = "full",
    text_only: TextOnly = False,
    ignore_unexpected: IgnoreUnexpected = False,
    mode: Annotated[str, typer.Option(help="full follows every tensor; phases only reads memory counters.")] = "full",
    predict: Annotated[bool, typer.Option(help="With --mode full, also predict the memory and compare.")] = True,
    html: Annotated[Path | None, typer.Option("--html", help="HTML file to write, with charts: report.html.")] = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="PNG file to write, with the memory over time: timeline.png.")
    ] = None,
    snapshot: Annotated[
        Path | None,
        typer.Option("--snapshot", help="File for torch's memory snapshot of an accelerator: memory.pickle."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files of --html and --png.")] = False,
    json: Json = False,
) -> None:
    """Run two training steps on random tokens; show the memory of each phase, measured and predicted."""
    from contextlib import nullcontext
    from json import dumps

    from qlora_lite.checkpoints.files import check_writable
    from qlora_lite.lora.config import LoraConfig
    from qlora_lite.memory.comparison import render_comparison
    from qlora_lite.memory.drawing.page import write_page
    from qlora_lite.memory.drawing.png import require_matplotlib, write_chart
    from qlora_lite.memory.profiler import MemoryProfiler
    from qlora_lite.memory.report import render
    from qlora_lite.memory.snapshot import memory_snapshot
    from qlora_lite.planning.training_rehearsal import try_rehearse_steps
    from qlora_lite.progress.work import working
    from qlora_lite.quantization.config import QuantConfig
    from qlora_lite.signals import deferred_signals
    from qlora_lite.training.config import TrainConfig, checkpointing_named
    from qlora_lite.training.loop import profile_steps

    if mode not in ("full", "phases"):
        raise typer.BadParameter(f"must be full or phases; got {mode!r}", param_hint="--mode")
    if png is not None and mode == "phases":
        raise typer.BadParameter("needs --mode full, which follows the tensors that it draws", param_hint="--png")
    quant = QuantConfig(
        format, embedding_format=embedding_format, int8_activations=int8_activations, skip_modules=skipped(skip_modules)
    )
    lora = LoraConfig(rank, 2 * rank)
    config = TrainConfig(steps=2, checkpointing=checkpointing_named(checkpointing))
    if html is not None:
        check_writable(html, ".html", overwrite)
    if png is not None:
        check_writable(png, ".png", overwrite)
        require_matplotlib()
    with deferred_signals(), nullcontext() if snapshot is None else memory_snapshot(snapshot):
        profiler = MemoryProfiler(trace=mode == "full")
        shape: dict[str, Any] = {"rows": rows, "tokens": tokens, "text_only": text_only}
        report = profile_steps(
            model, quant, lora, config, profiler=profiler, ignore_unexpected=ignore_unexpected, **shape
        )
    print(render(report))
    predicted = None
    if predict and mode == "full":
        with deferred_signals(), working("predicting the memory"):
            predicted, why_not = try_rehearse_steps(model, quant, lora, config, **shape)
        print(why_not if predicted is None else render_comparison(predicted, report))
    if html is not None:
        write_page(html, report, predicted, title=f"Two training steps of {model}", overwrite=overwrite)
    if png is not None:
        write_chart(png, report, predicted, overwrite=overwrite)
    if json:
        print(dumps(report.to_json() | {"predicted": None if predicted is None else predicted.to_json()}))
