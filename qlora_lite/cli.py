"""The command line: parses and wires, computes nothing. Heavy imports stand inside the commands, for quick help.

Exit status: 0 done, 1 failed (one line on stderr says why), 2 wrong usage, 3 does not fit (plan),
130 interrupted, 143 terminated.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_lite.cli_options import (
    Alpha,
    Blocksize,
    DoubleQuant,
    EmbeddingFormat,
    Format,
    Int8Activations,
    Json,
    MaxShardSize,
    Model,
    Output,
    Overwrite,
    Rank,
    RankStabilized,
)
from qlora_lite.cli_plan import chosen_checkpointing, plan
from qlora_lite.cli_profile import profile

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)

app = typer.Typer(
    help="Fine-tune a quantized language model in little memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Fine-tune a quantized language model in little memory."""


app.command()(plan)
app.command()(profile)


def _finish(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))
        return
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<{width}}  {'unknown' if value is None else value}")


def _check_output(folder: Path, overwrite: bool, *inputs: str | Path) -> None:
    from qlora_lite.storage import check_apart, check_replaceable

    check_apart(folder, *(Path(path) for path in inputs))
    check_replaceable(folder, overwrite)


def _train_figures(result: Any, tokenized: Any, output: Path, predicted: int | None) -> dict[str, Any]:
    foreseen = {} if predicted is None else {"predicted_peak_bytes": predicted}
    return {
        "examples": len(tokenized.examples),
        "examples_shortened": tokenized.truncated,
        "examples_dropped": tokenized.dropped,
        "first_loss": result.losses[0],
        "last_loss": result.losses[-1],
        "seconds": round(result.seconds, 1),
        "peak_bytes": result.steps[-1].peak_bytes,
        **foreseen,
        "own_loss_because": result.own_loss_because,
        "adapter": str(output / "adapter"),
    }


@app.command()
def train(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="JSONL with messages, prompt/completion, instruction or text.")],
    output: Output,
    format: Format = "nf4",
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = "none",
    int8_activations: Int8Activations = False,
    rank: Rank = 16,
    alpha: Alpha = 32.0,
    rslora: RankStabilized = False,
    variant: Annotated[str, typer.Option(help="lora, or dora.")] = "lora",
    init: Annotated[str, typer.Option(help="normal, kaiming, gaussian, orthogonal, pissa or loftq.")] = "normal",
    dropout: Annotated[float, typer.Option(help="Dropout on the adapters' input.")] = 0.0,
    targets: Annotated[str, typer.Option(help="all-linear, or layer names with commas.")] = "all-linear",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-4,
    lora_plus_ratio: Annotated[float, typer.Option(help="LoRA+: B learns at so many times A's rate.")] = 1.0,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 2,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Longer examples are cut to it.")] = 512,
    packing: Annotated[bool, typer.Option(help="Put several examples into a row.")] = False,
    completion_only: Annotated[bool, typer.Option(help="Learn the answers only, or all tokens.")] = True,
    optimizer: Annotated[str, typer.Option(help="adamw or adamw8bit.")] = "adamw",
    checkpointing: Annotated[
        str | None, typer.Option(help="full (recompute blocks, the default), none (keep all), 300MiB (what fits).")
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Recompute as little as fits into 20GiB, ..., by prediction.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of data order, adapters and dropout.")] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train adapters on a JSONL file; writes metrics.jsonl and adapter/ into the output folder."""
    from dataclasses import replace

    import torch

    from qlora_lite.adapters import add_lora_
    from qlora_lite.config import LoraConfig, QuantConfig, TrainConfig, init_parts
    from qlora_lite.data import batches, tokenize_all
    from qlora_lite.errors import ConfigError
    from qlora_lite.forecast import Wanted
    from qlora_lite.hub import load_tokenizer
    from qlora_lite.load import load_quantized
    from qlora_lite.records import read_jsonl
    from qlora_lite.run_folder import ADAPTER_FOLDER, METRICS_FILE
    from qlora_lite.storage import check_apart
    from qlora_lite.training import train as train_model

    quant = QuantConfig(
        format, blocksize, double_quant, int8_activations=int8_activations, embedding_format=embedding_format
    )
    names = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    lora = LoraConfig(rank, alpha, dropout, names, rslora=rslora, init=init, variant=variant)
    if init_parts(init)[1] > 1:
        raise ConfigError(f"init {init!r} packs the base anew, and this command writes no base; use it from Python")
    config = TrainConfig(
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        lora_plus_ratio=lora_plus_ratio,
        gradient_accumulation=gradient_accumulation,
        optimizer=optimizer,
        seed=seed,
    )
    check_apart(output / METRICS_FILE, data)
    _check_output(output / ADAPTER_FOLDER if overwrite else output, overwrite, model, data)
    records = read_jsonl(data)
    tokenizer = load_tokenizer(model)
    tokenized = tokenize_all(records, tokenizer, max_length, completion_only)
    longest = (
        max_length if packing else max((len(example.input_ids) for example in tokenized.examples), default=max_length)
    )
    wanted = Wanted(quant, lora, batch_size, longest, optimizer, accumulated=gradient_accumulation > 1)
    dial, predicted = chosen_checkpointing(memory_budget, checkpointing, model, wanted)
    padding = tokenizer.pad_token_id
    stream = batches(tokenized.examples, batch_size, seed, pad_token_id=padding, packing=packing, max_length=max_length)
    torch.manual_seed(seed)
    loaded = load_quantized(model, quant)
    add_lora_(loaded, lora)
    config = replace(config, checkpointing=dial)
    result = train_model(loaded, stream, config, output_dir=output, overwrite=overwrite)
    _finish(_train_figures(result, tokenized, output, predicted), json)


def _verification_prompts(path: Path, model: str, max_length: int) -> Any:
    from qlora_lite.data import tokenize_all
    from qlora_lite.hub import load_tokenizer
    from qlora_lite.records import read_jsonl

    records = read_jsonl(path, prompts_too=True)
    return tokenize_all(records, load_tokenizer(model), max_length, prompts_too=True)


@app.command()
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
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Merge an adapter into a checkpoint, from disk to disk; say the --format that it was trained on."""
    from qlora_lite.config import QuantConfig, byte_count, dtype_named
    from qlora_lite.export import REPORT_FILE, merge_checkpoint
    from qlora_lite.merge_report import render
    from qlora_lite.verify import render as render_verification

    target = dtype_named(dtype)
    quant = QuantConfig(format, blocksize, double_quant, embedding_format=embedding_format)
    shard = byte_count("--max-shard-size must be", max_shard_size)
    _check_output(output, overwrite, model, adapter, *(() if verify is None else (verify,)))
    prompts = None if verify is None else _verification_prompts(verify, model, verify_max_length)
    examples = None if prompts is None else prompts.examples
    done = merge_checkpoint(
        model, adapter, output, quant, target, base=base, max_shard_bytes=shard, overwrite=overwrite, verify=examples
    )
    print(render(done.report))
    total = done.report.to_json()["total"]
    layers = sum(figures.update is not None for figures in done.report.tensors)
    figures = {"layers_merged": layers, "base": base, "dtype": dtype, "files": done.files, "output": str(output)}
    figures["embedding_and_head_untied"] = done.untied
    found: dict[str, Any] = {}
    if done.verification is not None and prompts is not None:
        print(render_verification(done.verification))
        found = {"verify_shortened": prompts.truncated} | ({"verify": done.verification.to_json()} if json else {})
    _finish({**figures, "report": str(output / REPORT_FILE), **(total if json else {}), **found}, json)


@app.command()
def quantize(
    model: Model,
    output: Output,
    format: Annotated[str, typer.Option("--format", help="How the linear layers are stored: nf4, fp4 or int8.")] = (
        "nf4"
    ),
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = "none",
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a packed checkpoint that transformers loads as pre-quantized, and the other commands as --model."""
    from qlora_lite.config import QuantConfig, byte_count
    from qlora_lite.load import load_quantized
    from qlora_lite.quantized_files import save_quantized

    quant = QuantConfig(format, blocksize, double_quant, embedding_format=embedding_format)
    shard = byte_count("--max-shard-size must be", max_shard_size)
    _check_output(output, overwrite, model)
    files = save_quantized(load_quantized(model, quant), output, max_shard_bytes=shard, overwrite=overwrite)
    size = sum((output / file).stat().st_size for file in files)
    _finish({"format": format, "bytes": size, "files": files, "output": str(output)}, json)


@app.command()
def env(json: Json = False) -> None:
    """Show versions, the machine, and whether its CPU multiplies bf16."""
    from qlora_lite.environment import environment

    _finish(environment(), json)


def _terminate(number: int, frame: object) -> None:
    # As an exception, so that temporary folders are removed and what was trained is saved.
    sys.exit(128 + number)


def main() -> None:
    """Runs a command; what this package refuses becomes one line on stderr and exit status 1."""
    signal.signal(signal.SIGTERM, _terminate)
    if "--debug" in sys.argv[1:]:
        app()
    try:
        app()
    except SystemExit as error:
        if error.code in STOPPED:
            print("stopped; what was trained so far is saved, an unfinished export is removed", file=sys.stderr)
        raise
    except Exception as error:
        from qlora_lite.errors import QLoRAError

        known = isinstance(error, (QLoRAError, OSError))
        name = "" if known else f"{type(error).__name__}: "
        print(f"error: {name}{' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
