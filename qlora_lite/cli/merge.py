"""`qlora-lite merge`: merges an adapter into its base and writes a plain checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_lite.cli.data_options import tokenizing_progress
from qlora_lite.cli.options import (
    AnyBase,
    Blocksize,
    DoubleQuant,
    EmbeddingFormat,
    Format,
    IgnoreUnexpected,
    Json,
    MaxShardSize,
    Model,
    Output,
    Overwrite,
    SkipModules,
    check_not_given,
    check_output,
    finish,
    shard_bytes,
    skipped,
)
from qlora_lite.errors import listing
from qlora_lite.quantization.formats import DEFAULT_FORMAT, UNPACKED

if TYPE_CHECKING:
    from qlora_lite.data.tokenization import TokenizedSet
    from qlora_lite.export.gguf.merge import GgufExport
    from qlora_lite.export.merged import Exported
    from qlora_lite.quantization.config import QuantConfig

# Options of a folder of safetensors files, which a GGUF file has no use for.
FOLDERS_ALONE = ("names", "dtype", "max_shard_size")
# Options of a merge, which an adapter alone has no use for.
MERGES_ALONE = (
    *("base", "format", "blocksize", "double_quant", "embedding_format", "skip_modules", "ignore_unexpected"),
    *("verify", "verify_max_length"),
)
MODELFILE = "Modelfile"


def passed_over_line(names: Sequence[str]) -> str:
    """Returns a line about tensors of the checkpoint that are not merged; an empty text if there are none."""
    return f"{len(names)} tensors of the checkpoint are not merged: {listing(names)}\n" if names else ""


def _merge_to_gguf(
    model: str,
    adapter: Path,
    output: Path,
    quant: QuantConfig,
    type: str,
    base: str,
    overwrite: bool,
    prompts: TokenizedSet | None,
    any_base: bool,
    ignore_unexpected: bool,
    json: bool,
) -> None:
    from qlora_lite.export.gguf.merge import merge_checkpoint_to_gguf
    from qlora_lite.signals import deferred_signals

    with deferred_signals():
        done = merge_checkpoint_to_gguf(
            model,
            adapter,
            output,
            quant,
            type,
            base=base,
            overwrite=overwrite,
            verify=None if prompts is None else prompts.examples,
            any_base=any_base,
            ignore_unexpected=ignore_unexpected,
        )
    settings: dict[str, object] = {"base": base, "gguf": type, "architecture": done.architecture}
    written: dict[str, object] = {"tensors": sum(done.types.values())}
    written |= {f"tensors_in_{name}": count for name, count in done.types.items()}
    written |= {"error_of_packing": done.relative_error, "read_back": "equal", "bytes": done.bytes}
    written |= {"file": str(output / done.file), "modelfile": str(output / MODELFILE)}
    _show(done, prompts, settings, written, output, json)


def _adapter_to_gguf(
    model: str, adapter: Path, output: Path, type: str, overwrite: bool, any_base: bool, json: bool
) -> None:
    from qlora_lite.export.gguf.adapter import adapter_to_gguf
    from qlora_lite.signals import deferred_signals

    with deferred_signals():
        done = adapter_to_gguf(adapter, model, output, type, any_base=any_base, overwrite=overwrite)
    figures: dict[str, object] = {"layers": done.layers, "alpha": done.alpha, "gguf": type}
    figures |= {"architecture": done.architecture, "read_back": "equal", "bytes": done.bytes}
    finish(figures | {"file": str(output / done.file), "modelfile": str(output / MODELFILE)}, json)


def _show(
    done: Exported | GgufExport,
    prompts: TokenizedSet | None,
    settings: dict[str, object],
    written: dict[str, object],
    output: Path,
    json: bool,
) -> None:
    """Prints the report of an export, and its figures."""
    from qlora_lite.export.report import REPORT_FILE, render
    from qlora_lite.export.verify import render as render_verification

    print(passed_over_line(done.passed_over) + render(done.report))
    merged = sum(figures.update is not None for figures in done.report.tensors)
    figures: dict[str, object] = {"layers_merged": merged, **settings, **written}
    figures |= {"embedding_and_head_untied": done.untied, "report": str(output / REPORT_FILE)}
    if json:
        figures |= done.report.total_json()
    if done.verification is not None and prompts is not None:
        print(render_verification(done.verification))
        figures |= {"verify_shortened": prompts.truncated}
        figures |= {"verify": done.verification.to_json()} if json else {}
    finish(figures, json)


def merge(
    ctx: typer.Context,
    model: Model,
    adapter: Annotated[Path, typer.Option("--adapter", help="Folder of an adapter saved by train or by peft.")],
    output: Output,
    base: Annotated[
        str,
        typer.Option(help="Weights to merge into: dequantized (those that the adapter was trained on) or original."),
    ] = "dequantized",
    names: Annotated[
        str,
        typer.Option(
            help="Tensor names to write: checkpoint (those of --model's files, which vLLM and llama.cpp read) or model "
            "(those of transformers 5)."
        ),
    ] = "checkpoint",
    dtype: Annotated[str, typer.Option(help="dtype to write: fp16, bf16 or fp32.")] = "fp16",
    format: Format = DEFAULT_FORMAT,
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = UNPACKED,
    skip_modules: SkipModules = None,
    max_shard_size: MaxShardSize = "5GB",
    verify: Annotated[
        Path | None,
        typer.Option("--verify", help="Records as for train, or prompts alone: compare the logits before and after."),
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(
            "--gguf",
            help="Write one GGUF file, for llama.cpp and ollama: f32, f16, bf16, q8_0 (8 bits) or q4_0 (4 bits).",
        ),
    ] = None,
    adapter_only: Annotated[
        bool,
        typer.Option(
            "--adapter-only",
            help="With --gguf f32, f16 or bf16: write the adapter as a GGUF file of its own, and merge nothing.",
        ),
    ] = False,
    verify_max_length: Annotated[int, typer.Option(help="Tokens that records of --verify are truncated to.")] = 512,
    any_base: AnyBase = False,
    ignore_unexpected: IgnoreUnexpected = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Merge an adapter into a checkpoint, from disk to disk; give the --format that it was trained with."""
    from qlora_lite.checkpoints.hub import load_tokenizer
    from qlora_lite.checks import dtype_named, is_count, require
    from qlora_lite.data.tokenization import DataConfig, tokenize_sources
    from qlora_lite.export.merged import merge_checkpoint
    from qlora_lite.quantization.config import QuantConfig
    from qlora_lite.signals import deferred_signals

    target = dtype_named(dtype)
    quant = QuantConfig(
        format, blocksize, double_quant, embedding_format=embedding_format, skip_modules=skipped(skip_modules)
    )
    shard = shard_bytes(max_shard_size)
    require(is_count(verify_max_length, 2), "--verify-max-length must be at least 2", verify_max_length)
    check_output(output, overwrite, model, adapter, *(() if verify is None else (verify,)))
    require(gguf is not None or not adapter_only, "--adapter-only needs --gguf f32, f16 or bf16", gguf)
    if gguf is not None:
        check_not_given(ctx, "--gguf", FOLDERS_ALONE)
    if gguf is not None and adapter_only:
        check_not_given(ctx, "--adapter-only", MERGES_ALONE)
        _adapter_to_gguf(model, adapter, output, gguf, overwrite, any_base, json)
        return
    prompts = None
    if verify is not None:
        config = DataConfig(max_length=verify_max_length, prompts_too=True)
        with tokenizing_progress() as show:
            prompts = tokenize_sources([str(verify)], load_tokenizer(model), config, show=show)
    if gguf is not None:
        _merge_to_gguf(model, adapter, output, quant, gguf, base, overwrite, prompts, any_base, ignore_unexpected, json)
        return
    with deferred_signals():
        done = merge_checkpoint(
            model,
            adapter,
            output,
            quant,
            target,
            base=base,
            names=names,
            max_shard_bytes=shard,
            overwrite=overwrite,
            verify=None if prompts is None else prompts.examples,
            any_base=any_base,
            ignore_unexpected=ignore_unexpected,
        )
    settings: dict[str, object] = {"base": base, "names": names, "dtype": dtype}
    _show(done, prompts, settings, {"files": done.files, "output": str(output)}, output, json)
