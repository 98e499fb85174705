"""Tests of a run's folder: its files, the lock against a second process, and its contents after an error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qlora_lite import LinearWithLoRA, TrainConfig
from qlora_lite.data.stream import BatchStream
from qlora_lite.errors import CheckpointError, ConfigError, NotFiniteError, Stopped
from qlora_lite.training import run_folder as module
from qlora_lite.training.run_folder import LOCK_FILE, locked_folder, run_folder
from qlora_lite.training.run_state import Run


@dataclass
class Step:
    loss: float
    tokens: int = 8
    learning_rate: float = 0.5


class Failed(Exception):
    pass


def model() -> nn.Sequential:
    return nn.Sequential(LinearWithLoRA(4, 4, 2))


def run_of(layers: nn.Module) -> Run:
    return Run(layers, {}, torch.optim.SGD([torch.zeros(1)]), TrainConfig(), BatchStream([], None, None))


def saved_b(folder: Path) -> float:
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    return float(next(value for key, value in tensors.items() if "lora_B" in key).flatten()[0])


def set_b(layers: nn.Sequential, value: float) -> None:
    with torch.no_grad():
        layers[0].lora_B.fill_(value)


def test_behind_a_link_stands_the_folder_that_is_meant(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with run_folder(run_of(model()), tmp_path / "link", overwrite=False):
        pass
    assert (tmp_path / "new" / "adapter").is_dir() and (tmp_path / "link").is_symlink()
    (tmp_path / "other").symlink_to(tmp_path / "unused")
    with pytest.raises(Failed), run_folder(run_of(model()), tmp_path / "other", overwrite=False):
        raise Failed
    assert not (tmp_path / "unused").exists()


def test_a_run_that_ends_well_leaves_its_metrics_and_its_last_values(tmp_path: Path) -> None:
    layers = model()
    with run_folder(run_of(layers), tmp_path / "run", overwrite=False, notes={"date": "today"}) as writer:
        for loss in (2.0, 1.0):
            writer.before_update()
            assert (tmp_path / "run" / "data.json").exists() == (loss == 1.0), "notes came before the first step"
            set_b(layers, loss)
            writer.finish_step(Step(loss))
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == {"date": "today"}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [2.0, 1.0]
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "| optimizer steps | 2 |\n| tokens, padding included | 16 |\n| peak learning rate | 0.5 |" in card
    assert "| loss of the last step | 1 |" in card
    assert saved_b(tmp_path / "run") == 1.0


def test_what_diverged_does_not_replace_what_was_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVING_SHARE", 1e9)  # a save at every step
    layers = model()
    said = pytest.raises(NotFiniteError, match=r"nan; .*adapter holds an adapter that gave a finite loss")
    with said, run_folder(run_of(layers), tmp_path / "run", overwrite=False) as writer:
        for value in (3.0, 4.0, float("nan")):
            writer.before_update()
            set_b(layers, value)
        raise NotFiniteError("nan")
    assert saved_b(tmp_path / "run") == 4.0


def test_another_error_saves_what_there_is(tmp_path: Path) -> None:
    layers = model()
    with pytest.raises(Failed), run_folder(run_of(layers), tmp_path / "run", overwrite=False) as writer:
        writer.before_update()
        set_b(layers, 5.0)
        raise Failed
    assert saved_b(tmp_path / "run") == 5.0


def test_saving_takes_its_share_of_the_time_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves: list[int] = []
    monkeypatch.setattr(module, "save_adapter", lambda *given, **options: saves.append(1))
    monkeypatch.setattr(module, "SAVING_SHARE", 1e-9)
    with run_folder(run_of(model()), tmp_path / "run", overwrite=False) as writer:
        for _ in range(5):
            writer.before_update()
        assert saves == [1]


@pytest.mark.parametrize("error", [Failed, NotFiniteError])
def test_a_run_without_a_good_step_leaves_nothing(tmp_path: Path, error: type[Exception]) -> None:
    with pytest.raises(error), run_folder(run_of(model()), tmp_path / "run", overwrite=False):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder, message in ((tmp_path, "is not empty"), (tmp_path / "file", "is a file")):
        with pytest.raises(CheckpointError, match=message), run_folder(run_of(model()), folder, overwrite=False):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with run_folder(run_of(model()), folder, overwrite=False) as writer:
        writer.before_update()
        other = pytest.raises(CheckpointError, match="run is being written by another run")
        with other, run_folder(run_of(model()), folder, overwrite=True):
            pass
    assert [path.name for path in folder.iterdir()] == ["adapter"]


def test_an_interrupt_at_once_saves_nothing_and_stopping_before_a_step_says_so(tmp_path: Path) -> None:
    layers = model()
    with pytest.raises(KeyboardInterrupt), run_folder(run_of(layers), tmp_path / "run", overwrite=False) as writer:
        writer.before_update()
        set_b(layers, 7.0)
        raise KeyboardInterrupt
    assert saved_b(tmp_path / "run") == 0.0
    said = pytest.raises(Stopped, match="stopped by SIGTERM before the first step was done")
    with said, run_folder(run_of(layers), tmp_path / "run", overwrite=True):
        raise Stopped(signal.SIGTERM, "stopped")
    with (
        pytest.raises(ConfigError, match="ask for one of them"),
        run_folder(run_of(layers), tmp_path / "run", True, True),
    ):
        pass


HOLD = """
import sys, time
from pathlib import Path
from qlora_lite.training.run_folder import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_told_the_first_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=rf"another run \(process {other.pid}\)"), locked_folder(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_FILE).is_file()
    with (
        locked_folder(tmp_path),
        pytest.raises(CheckpointError, match=rf"process {os.getpid()}\)"),
        locked_folder(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_went_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked_folder(tmp_path / "run") as check:
        check()
        shutil.rmtree(tmp_path / "run")
        for _ in range(2):
            with pytest.raises(CheckpointError, match="was removed, or replaced, while a run was writing there"):
                check()
            (tmp_path / "run").mkdir(exist_ok=True)
