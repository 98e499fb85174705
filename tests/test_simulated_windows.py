"""Tests that the package does the same where what Windows lacks is taken away. Simulated on Linux, never run there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(__file__).with_name("simulated_windows.py")


def start(folder: Path, checkpoint: Path, *words: str) -> subprocess.Popen[str]:
    (folder / "data").mkdir(parents=True)
    data = folder / "data" / "train.jsonl"
    records = [{"prompt": "a b" * number, "completion": f" answer {number}"} for number in range(1, 9)]
    data.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (folder / "work").mkdir()
    command = [sys.executable, str(PROGRAM), str(checkpoint), str(data), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder / "work", stdout=pipe, stderr=pipe, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="takes from Linux what others lack")
def test_simulated_without_fcntl_proc_and_open_folders_all_files_are_the_same(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copytree(tiny_folder, tmp_path / "model")
    here = start(tmp_path / "here", tmp_path / "model")
    simulated = start(tmp_path / "simulated", tmp_path / "model", "--simulated")
    with here, simulated:
        whole, lacking = result(here), result(simulated)
    assert lacking["same"] == whole["same"]
    assert lacking["same"]["files"] > 150 and "merged/model.safetensors" in lacking["same"]["names"]
    assert len(lacking["lacking"]["missing"]) == 5 and not lacking["lacking"]["peak"]
    assert lacking["lacking"]["tokens kept"] and not whole["lacking"]["tokens kept"]
    left = [path.name for path in tmp_path.rglob("*") if path.name.endswith((".partial", ".lock", ".old"))]
    assert left == []
