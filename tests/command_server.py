"""Runs `qlora-lite` in forks of a process that has imported everything already.

A command on a tiny model takes less time than its imports. The server answers each line of input, a JSON object of
words, environment, folder and the files for stdin, stdout and stderr, with the exit status. Instead of a command it may
have the text of a program, which is run like `python -c`. Each has a process of its own, so signals, file descriptors
and global state are those of a new process but for the imports.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PRELOADED = (
    *("torch", "transformers", "transformers.models.llama.modeling_llama", "accelerate", "safetensors", "rich.table"),
    *("qlora_lite.cli.main", "qlora_lite.training.loop", "qlora_lite.export.merged", "qlora_lite.planning.memory_plan"),
    *("qlora_lite.data.summary", "qlora_lite.planning.training_rehearsal"),
)


class CommandServer:
    """The server as seen by the tests."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self, *words: object, stdin: str = "", terminal: str | None = None, program: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command with the environment and the folder that this process has now.

        stdin: what it reads. terminal: a device (`os.ttyname`) that it reads, writes and is controlled by instead.
        program: Python code to run with these words instead of `qlora-lite`.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        given = [*map(str, words)]
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
            for file in files:
                file.write_text(stdin if file.name == "stdin" else "", encoding="utf-8", errors="surrogateescape")
            request = {"words": given, "env": dict(os.environ), "cwd": os.getcwd(), "files": [*map(str, files)]}
            request |= {"terminal": terminal, "program": program}
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            texts = (file.read_text(encoding="utf-8", errors="surrogateescape") for file in files[1:])
            return subprocess.CompletedProcess(given, status, *texts)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _run_here(request: dict[str, Any]) -> int:
    """Runs the command of a request in this process, a fork; returns its exit status."""
    terminal = request["terminal"]
    if terminal is not None:
        os.setsid()  # the terminal that is opened next then sends its Ctrl-C here
    for number, name in enumerate([terminal] * 3 if terminal is not None else request["files"]):
        os.dup2(os.open(name, os.O_RDWR), number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, encoding="utf-8", closefd=False) for number, mode in enumerate("rww")
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    program = request["program"]
    sys.argv = ["qlora-lite" if program is None else "-c", *request["words"]]
    from qlora_lite.cli.main import main

    try:
        if program is None:
            main()
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve() -> None:
    """Answers requests until the input ends."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = _run_here(json.loads(line))
            finally:
                os._exit(status)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
