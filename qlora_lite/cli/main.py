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
from typing import Annotated, Any

import typer

from qlora_lite.cli.env import env
from qlora_lite.cli.inspect import inspect
from qlora_lite.cli.merge import merge
from qlora_lite.cli.options import StrictCommand
from qlora_lite.cli.plan import plan
from qlora_lite.cli.profile import profile
from qlora_lite.cli.quantize import quantize
from qlora_lite.cli.train import train
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


for command in (plan, train, profile, merge, quantize, inspect, env):
    app.command(cls=StrictCommand)(command)


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
