"""The entry point `qlora-lite`: runs a command, and turns errors and signals into one line and an exit status.

Heavy imports are inside the commands, so that `--help` is quick.

Exit status: 0 done, 1 failed, 2 wrong usage (one line on stderr says what was wrong), 3 does not fit (plan),
130 interrupted, 143 terminated.
"""

from __future__ import annotations

import io
import itertools
import os
import shlex
import signal
import subprocess
import sys
import traceback
from typing import Annotated

import typer

from qlora_lite.checkpoints.repository.revisions import hub_asked_once
from qlora_lite.cli.configuration.command import ConfiguredCommand
from qlora_lite.cli.configuration.init import init
from qlora_lite.cli.data import data
from qlora_lite.cli.env import env
from qlora_lite.cli.generation.chat import chat
from qlora_lite.cli.generation.generate import generate
from qlora_lite.cli.generation.serve import serve
from qlora_lite.cli.inspect import inspect
from qlora_lite.cli.merge import merge
from qlora_lite.cli.options import StrictCommand
from qlora_lite.cli.plan import plan
from qlora_lite.cli.profile import profile
from qlora_lite.cli.push import push
from qlora_lite.cli.quantize import quantize
from qlora_lite.cli.train import train
from qlora_lite.cli.training.report import report
from qlora_lite.errors import Stopped
from qlora_lite.progress.work import progress_shown
from qlora_lite.signals import exit_on_signals

app = typer.Typer(
    help="Fine-tune a quantized language model in little memory.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Fine-tune a quantized language model in little memory."""


for command in (init, data, plan, train, report, chat, generate, serve, profile, merge, quantize, push, inspect, env):
    app.command(cls=ConfiguredCommand if command is train else StrictCommand)(command)


# The class of all usage errors has no name in typer, and its module differs between typer's versions. It has the
# methods of BadParameter that are used here.
UsageError: type[typer.BadParameter] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError"
)


def _message_and_status(error: Exception) -> tuple[str, int]:
    """Returns one line and the exit status for an error of a command."""
    from qlora_lite.errors import ConfigError, QLoRAError, TargetError

    if isinstance(error, UsageError):
        where = "" if error.ctx is None else f"; see {error.ctx.command_path} --help"
        message, status = f"{error.format_message().rstrip('.')}{where}", 2
    else:
        name = "" if isinstance(error, (QLoRAError, OSError)) else f"{type(error).__name__}: "
        message, status = f"{name}{error}", 2 if isinstance(error, (ConfigError, TargetError)) else 1
    return _printable(" ".join(message.split())), status


def _printable(text: str) -> str:
    """The text with escapes for characters that a terminal would obey: a message may quote names and keys of files."""
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in text)


def _with_resume_command(message: str, words: list[str]) -> str:
    """Returns the message, for a training run with the command that resumes it, and for answers that it is the same."""
    command = next((word for word in words if not word.startswith("-")), None)
    if command == "generate":
        return f"{message}; the same command goes on with what is left"
    if command != "train":
        return message
    again = [word for word in words if word not in ("--overwrite", "--resume")]
    joined = subprocess.list2cmdline if sys.platform == "win32" else shlex.join  # quoted for the shell of the system
    return f"{message}; go on with: {joined(['qlora-lite', *again, '--resume'])}"


def _exit_at_once(number: int, frame: object) -> None:
    os._exit(128 + number)


def main() -> None:
    """Runs the command of `sys.argv`. An error becomes one line on stderr and the exit status."""
    words = sys.argv[1:]
    if not words:
        sys.argv.append("--help")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are not UTF-8
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _exit_at_once)  # no traceback while the interpreter shuts down
    try:
        stopped = exit_on_signals(_with_resume_command("stopped at once; nothing was saved", words))
        with stopped, progress_shown(), hub_asked_once():
            status = app(prog_name="qlora-lite", standalone_mode=False)
    except Stopped as stop:
        print(_with_resume_command(str(stop), words), file=sys.stderr)
        sys.exit(stop.code)
    except Exception as error:
        if "--debug" in itertools.takewhile(lambda word: word.startswith("-"), words):
            traceback.print_exc()
        line, status = _message_and_status(error)
        print(f"error: {line}", file=sys.stderr)
    sys.exit(status)
