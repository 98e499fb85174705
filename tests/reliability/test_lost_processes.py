"""A sample of lost_processes.py: processes of a run with a base in shares that are killed or fail."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("lost_processes.py")


@pytest.mark.parametrize("words", [["--tiny"], pytest.param([], marks=pytest.mark.matrix)])
def test_the_others_end_with_the_reason_and_the_same_call_goes_on(words: list[str], command_server: Any) -> None:
    done = subprocess.run([command_server.python, SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures.pop("moments") >= 3
    assert set(figures.values()) == {0}, done.stdout
