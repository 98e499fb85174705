"""Two processes, one folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lite.errors import CheckpointError
from qlora_lite.training.run_folder import LOCK_FILE, only_run

HOLD = """
import sys, time
from pathlib import Path
from qlora_lite.training.run_folder import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_told_the_first_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=rf"another run \(process {other.pid}\)"), only_run(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_FILE).is_file()
    with only_run(tmp_path), pytest.raises(CheckpointError, match=rf"process {os.getpid()}\)"), only_run(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_went_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with only_run(tmp_path / "run") as check:
        check()
        shutil.rmtree(tmp_path / "run")
        for _ in range(2):
            with pytest.raises(CheckpointError, match="was removed, or replaced, while a run was writing there"):
                check()
            (tmp_path / "run").mkdir(exist_ok=True)
