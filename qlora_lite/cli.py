"""The command line: parses and wires, computes nothing. Heavy imports stand inside the commands, for quick help.

Exit status: 0 done, 1 failed, 2 wrong usage (one line on stderr says what was wrong), 3 does not fit (plan),
130 interrupted, 143 terminated.
"""

from __future__ import annotations

import io
import itertools
import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_lite.cli_inspect import inspect
from qlora_lite.cli_options import (
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
    StrictCommand,
    check_output,
    finish,
    shard_bytes,
)
from qlora_lite.cli_plan import plan
from qlora_lite.cli_profile import profile
from qlora_lite.cli_train import train
from qlora_lite.errors import Stopped
from qlora_lite.signals import ended_by_signals

app = typer.Typer(
    help="Fine-tune a quantized language model in little memory.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Fine-tune a quantized language model in little memory."""


for command in (train, plan, profile, inspect):
    app.command(cls=StrictCommand)(command)


def _verification_prompts(path: Path, model: str, max_length: int) -> Any:
    from qlora_lite.checkpoints.hub import load_tokenizer
    from qlora_lite.data.records import read_jsonl
    from qlora_lite.data.tokenization import tokenize_all

    records = read_jsonl(path, prompts_too=True)
    return tokenize_all(records, load_tokenizer(model), max_length, prompts_too=True)


@app.command(cls=StrictCommand)
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


@app.command(cls=StrictCommand)
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
    from qlora_lite.checkpoints.load import load_quantized
    from qlora_lite.export.quantized import save_quantized
    from qlora_lite.quantization.config import QuantConfig
    from qlora_lite.quantization.formats import format_named
    from qlora_lite.signals import stoppable

    quant = QuantConfig(format, blocksize, double_quant, embedding_format=embedding_format)
    format_named(format)  # "none" packs nothing
    shard = shard_bytes(max_shard_size)
    check_output(output, overwrite, model)
    with stoppable():
        files = save_quantized(load_quantized(model, quant), output, max_shard_bytes=shard, overwrite=overwrite)
    size = sum((output / file).stat().st_size for file in files)
    finish({"format": format, "bytes": size, "files": files, "output": str(output)}, json)


@app.command(cls=StrictCommand)
def env(json: Json = False) -> None:
    """Show versions, the machine, and whether its CPU multiplies bf16."""
    from qlora_lite.compute.environment import environment

    finish(environment(), json)


# typer has no name of its own for the ancestor of all wrong usage, nor a module that holds it in every version.
UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")


def _refusal(error: Exception) -> tuple[str, int]:
    """(one line, exit status) for what a command raised."""
    from qlora_lite.errors import ConfigError, QLoRAError, TargetError

    if isinstance(error, UsageError):
        where = f"; see {error.ctx.command_path} --help" if getattr(error, "ctx", None) else ""
        said, status = f"{error.format_message().rstrip('.')}{where}", 2
    else:
        name = "" if isinstance(error, (QLoRAError, OSError)) else f"{type(error).__name__}: "
        said, status = f"{name}{error}", 2 if isinstance(error, (ConfigError, TargetError)) else 1
    return " ".join(said.split()), status


def _where_to_go_on(said: str, words: list[str]) -> str:
    """What was stopped, and for a run the command that goes on with it."""
    command = next((word for word in words if not word.startswith("-")), None)
    if command != "train":
        return said
    again = [word for word in words if word not in ("--overwrite", "--resume")]
    return f"{said}; go on with: {shlex.join(['qlora-lite', *again, '--resume'])}"


def _leave(number: int, frame: object) -> None:
    os._exit(128 + number)


def main() -> None:
    """Runs a command; what it refuses becomes one line on stderr and an exit status."""
    words = sys.argv[1:]
    if not words:
        sys.argv.append("--help")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have bytes that are no text
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave)  # what comes while the interpreter ends is no traceback
    try:
        with ended_by_signals(_where_to_go_on("stopped at once; nothing was saved", words)):
            status = app(prog_name="qlora-lite", standalone_mode=False)
    except Stopped as stop:
        print(_where_to_go_on(str(stop), words), file=sys.stderr)
        sys.exit(stop.code)
    except Exception as error:
        if "--debug" in itertools.takewhile(lambda word: word.startswith("-"), words):
            traceback.print_exc()
        line, status = _refusal(error)
        print(f"error: {line}", file=sys.stderr)
    sys.exit(status)
