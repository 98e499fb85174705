"""A sample of the moments of stopped_commands.py: commands that get a signal during their work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("stopped_commands.py")


def test_stopped_commands_say_one_line_and_leave_nothing_half_done(command_server: Any) -> None:
    done = subprocess.run([command_server.python, SCRIPT, "--tiny"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"stopped": 5, "wrong": 0}, done.stdout


def test_every_moment_is_in_a_function_that_exists(import_script: Callable[[str], Any]) -> None:
    stops = import_script("tests/reliability/stopped_commands.py")
    assert len(stops.MOMENTS) > 20
    for moment in stops.MOMENTS:
        owner, name = stops._owner(moment.function)
        assert callable(getattr(owner, name)), moment.function


SLEEPING = """
import sys, time
from qlora_lite.compute import environment
from qlora_lite.cli.main import main

def asleep():
    print("here", flush=True)
    time.sleep(60)

environment.environment = asleep
sys.argv = ["qlora-lite", "env"]
main()
"""


def test_a_whole_process_ends_by_a_signal_from_outside() -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SLEEPING], **pipes)
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (130, "stopped by SIGINT; nothing is left half-written\n")
