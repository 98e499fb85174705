"""`qlora-lite merge`: an adapter merged into its base, written as a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_lite.cli.options import (
    AnyBase,
    Blocksize,
    DoubleQuant,
    EmbeddingFormat,
    Format,
    Json,
    MaxShardSize,
    Model,
    Output,
    Overwrite,
    check_output,
    finish,
    shard_bytes,
)


def _verification_prompts(path: Path, model: str, max_length: int) -> Any:
    from qlora_lite.checkpoints.hub import load_tokenizer
    from qlora_lite.data.records import read_records
    from qlora_lite.data.tokenization import tokenize_all

    records = read_records(path, prompts_too=True)
    return tokenize_all(records, load_tokenizer(model), max_length, prompts_too=True)


def merge(
    model: Model,
    adapter: Annotated[Path, typer.Option("--adapter", help="Folder saved by train, or by peft.")],
    output: Output,
    base: Annotated[str, typer.Option(help="dequantized: into what was trained on; original: into --model.")] = (
        "dequantized"
    ),
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    format: Format = "nf4",
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = "none",
    max_shard_size: MaxShardSize = "5GB",
    verify: Annotated[
        Path | None, typer.Option("--verify", help="JSONL as for train, or prompts alone: compare the logits on it.")
    ] = None,
    verify_max_length: Annotated[int, typer.Option(help="Longer records of --verify are cut to it.")] = 512,
    any_base: AnyBase = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Merge an adapter into a checkpoint, from disk to disk; say the --format that it was trained on."""
    from qlora_lite.checks import dtype_named, is_count, require
    from qlora_lite.export.merged import REPORT_FILE, merge_checkpoint
    from qlora_lite.export.report import render
    from qlora_lite.export.verify import render as render_verification
    from qlora_lite.quantization.config import QuantConfig
    from qlora_lite.signals import stoppable

    target = dtype_named(dtype)
    quant = QuantConfig(format, blocksize, double_quant, embedding_format=embedding_format)
    shard = shard_bytes(max_shard_size)
    require(is_count(verify_max_length, 2), "--verify-max-length must be at least 2", verify_max_length)
    check_output(output, overwrite, model, adapter, *(() if verify is None else (verify,)))
    prompts = None if verify is None else _verification_prompts(verify, model, verify_max_length)
    examples = None if prompts is None else prompts.examples
    options: Any = {"base": base, "max_shard_bytes": shard, "overwrite": overwrite, "verify": examples}
    with stoppable():
        done = merge_checkpoint(model, adapter, output, quant, target, any_base=any_base, **options)
    print(render(done.report))
    total = done.report.to_json()["total"]
    layers = sum(figures.update is not None for figures in done.report.tensors)
    figures = {"layers_merged": layers, "base": base, "dtype": dtype, "files": done.files, "output": str(output)}
    figures["embedding_and_head_untied"] = done.untied
    found: dict[str, Any] = {}
    if done.verification is not None and prompts is not None:
        print(render_verification(done.verification))
        found = {"verify_shortened": prompts.truncated} | ({"verify": done.verification.to_json()} if json else {})
    finish({**figures, "report": str(output / REPORT_FILE), **(total if json else {}), **found}, json)
