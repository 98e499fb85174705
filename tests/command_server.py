"""Runs `qlora-lite`, programs and scripts in forks of a process that has imported everything already.

A command on a tiny model takes less time than its imports. The server answers each line of input, a JSON object of
words, environment, folder and the files for stdin, stdout and stderr, with the exit status. Instead of a command it may
have the text of a program, which is run like `python -c`. Each has a process of its own, so signals, file descriptors
and global state are those of a new process but for the imports.

Scripts come over a socket, several at a time: `CommandServer.python` is a file to run them with, like the Python of
`sys.executable`, which it replaces in their processes. So the workers that a script starts are forks too.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PRELOADED = (
    *("torch", "transformers", "transformers.models.llama.modeling_llama", "accelerate", "safetensors", "rich.table"),
    *("qlora_lite.cli.main", "qlora_lite.training.loop", "qlora_lite.export.merged", "qlora_lite.planning.memory_plan"),
    *("qlora_lite.data.summary", "qlora_lite.planning.training_rehearsal"),
)
# Of scripts, and imported with the first one. What reads its settings from the environment is not among them.
PRELOADED_FOR_SCRIPTS = (
    *("peft", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "qlora_lite.integrations.trl", "matplotlib.figure"),
)
CLIENT = Path(__file__).with_name("forked_python.py")


class CommandServer:
    """The server as seen by the tests. python: a file that runs a script as Python does."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp()
        self.python = os.path.join(self._folder, "python")
        address = os.path.join(self._folder, "socket")
        words = shlex.join([sys.executable, "-IS", str(CLIENT), address])
        Path(self.python).write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
        os.chmod(self.python, 0o755)
        command = [sys.executable, __file__, address, self.python]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "listening\n"

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
        shutil.rmtree(self._folder)


def _run_command(request: dict[str, Any]) -> int:
    """Runs the command or program of a request in this process, a fork; returns its exit status."""
    terminal, program = request["terminal"], request["program"]
    if terminal is not None:
        os.setsid()  # the terminal that is opened next then sends its Ctrl-C here
    files = [os.open(name, os.O_RDWR) for name in ([terminal] * 3 if terminal is not None else request["files"])]
    if program is not None:
        code = compile(program, "<string>", "exec")
        return _run_here(request, files, "-c", lambda: exec(code, {"__name__": "__main__"}))
    from qlora_lite.cli.main import main

    return _run_here(request, files, "qlora-lite", main)


def _run_script(request: dict[str, Any], files: Iterable[int], python: str) -> int:
    """Runs the script of a request in this process, a fork; returns its exit status."""
    sys.path[0] = os.path.dirname(os.path.join(request["cwd"], request["script"]))
    sys.executable = python
    return _run_here(request, files, request["script"], lambda: runpy.run_path(request["script"], run_name="__main__"))


def _run_here(request: dict[str, Any], files: Iterable[int], name: str, main: Callable[[], object]) -> int:
    """Runs `main` as the program `name` with the words, environment, folder and standard files of a request."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, encoding="utf-8", closefd=False) for number, mode in enumerate("rww")
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [name, *request["words"]]
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
            return 1
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _forked(run: Callable[[], int], answer: Callable[[int], object] = lambda status: None) -> int:
    """Calls `run` in a fork, which gives its status to `answer` and ends with it. Returns the number of the process."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = run()
            answer(status)
        finally:
            os._exit(status)
    return child


def _forget_ended_scripts() -> None:
    with contextlib.suppress(ChildProcessError):  # there are none
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _accept(listening: socket.socket, python: str) -> None:
    """Starts the script that a client asks for. The fork answers the client."""
    client, _ = listening.accept()
    with client:
        _, files, _, _ = socket.recv_fds(client, 1, 3)
        with client.makefile("rb") as lines:
            request = json.loads(lines.readline())
        _forked(lambda: _run_script(request, files, python), lambda status: client.sendall(b"%d" % status))
        for file in files:
            os.close(file)


def _preload(names: Iterable[str]) -> None:
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy the pages of all objects


def _tell(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def serve(address: str, python: str) -> None:
    """Answers requests until the input ends. address: of the socket for scripts. python: what stands in for Python."""
    _preload(PRELOADED)
    ready = selectors.DefaultSelector()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(address)
        listening.listen()
        ready.register(listening, selectors.EVENT_READ)
        ready.register(sys.stdin, selectors.EVENT_READ)
        _tell("listening")
        while True:
            _forget_ended_scripts()
            if listening in [key.fileobj for key, _ in ready.select()]:
                _preload(PRELOADED_FOR_SCRIPTS)
                _accept(listening, python)
                continue
            line = sys.stdin.readline()
            if not line:
                _forget_ended_scripts()
                return
            child = _forked(lambda line=line: _run_command(json.loads(line)))
            _tell(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    serve(*sys.argv[1:])
