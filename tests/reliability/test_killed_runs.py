"""A sample of the kills of killed_runs.py: processes killed at their writes, syncs and renames."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("killed_runs.py")


def test_a_killed_run_is_finished_by_the_same_call_to_the_same_files(command_server: Any) -> None:
    done = subprocess.run([command_server.python, SCRIPT, "--tiny"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["killed"]["run"] >= 6 and figures["killed"]["resumed run"] >= 3, done.stdout
    assert figures["wrong"] == 0, done.stdout
