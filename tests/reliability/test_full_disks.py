"""Full disks, read-only folders and folders that vanish: one error, and the saved files stay whole."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import LoraConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.data.stream import BatchStream
from qlora_lite.errors import CheckpointError
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.training.run_checkpoints import checkpoint_path, newest_intact_checkpoint
from qlora_lite.training.run_folder import RunFolder
from qlora_lite.training.run_state import Run

CONFIG = TrainConfig(steps=4, save_steps=1, learning_rate=1e-2)


class Batches(list[dict[str, torch.Tensor]]):
    """Four batches; `happens` is called before the third."""

    def __init__(self, happens: Callable[[], Any] = lambda: None) -> None:
        rows = torch.randint(100, (4, 1, 8), generator=torch.Generator().manual_seed(0))
        super().__init__({"input_ids": row, "labels": row} for row in rows)
        self.happens = happens

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for index in range(len(self)):
            if index == 2:
                self.happens()
            yield self[index]


def adapted(folder: Path) -> Any:
    model = load_quantized(folder, dtype=torch.float32)
    torch.manual_seed(0)
    add_lora_(model, LoraConfig(rank=2, dropout=0.1))
    return model


@contextmanager
def files_no_longer_than(size: int) -> Iterator[Callable[[], None]]:
    """Yields a function that limits the size of files, so that writes fail as on a full disk; restores it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tiny_folder: Path, memory_path: Path) -> None:
    run = memory_path / "run"
    full = pytest.raises(CheckpointError, match=r"step-000003 cannot be written: File too large|adapter cannot be")
    with files_no_longer_than(4000) as fill, full:
        train(adapted(tiny_folder), Batches(fill), CONFIG, output_dir=run, progress=False)
    assert newest_intact_checkpoint(run) == (checkpoint_path(run, 2), [])
    assert {path.name for path in run.iterdir()} == {"adapter", "checkpoints", "events.jsonl", "metrics.jsonl"}
    assert not list(run.rglob(".*"))
    model, other = adapted(tiny_folder), adapted(tiny_folder)
    resumed = train(model, Batches(), CONFIG, output_dir=run, resume=True, progress=False)
    whole = train(other, Batches(), CONFIG, output_dir=memory_path / "whole", progress=False)
    assert resumed.losses == whole.losses
    ours, theirs = adapter_parameters(model), adapter_parameters(other)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_line_that_a_full_disk_cuts_is_removed(memory_path: Path) -> None:
    @dataclass(frozen=True)
    class Line:
        step: int
        words: str = "a few more bytes than the disk has"

    optimizer = torch.optim.SGD([torch.zeros(1)])
    folder = RunFolder(
        Run(torch.nn.Linear(1, 1), {}, optimizer, TrainConfig(), BatchStream([], None, None)), memory_path
    )
    folder.finish_step(Line(1))
    first = (memory_path / "metrics.jsonl").read_bytes()
    with files_no_longer_than(len(first) + 20) as fill, pytest.raises(OSError, match="File too large"):
        fill()
        folder.finish_step(Line(2))
    assert (memory_path / "metrics.jsonl").read_bytes() == first
    folder.finish_step(Line(2))
    assert [json.loads(line)["step"] for line in (memory_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_folder_that_vanishes_is_not_made_again(tiny_folder: Path, memory_path: Path) -> None:
    run = memory_path / "run"
    with pytest.raises(CheckpointError, match="was removed, or replaced, while a run was writing there"):
        train(adapted(tiny_folder), Batches(lambda: shutil.rmtree(run)), CONFIG, output_dir=run, progress=False)
    assert not run.exists()


def test_where_nothing_can_be_written_nothing_is_trained(tiny_folder: Path, tmp_path: Path) -> None:
    places = [Path("/proc/run")]
    if os.geteuid() != 0:  # root may write everywhere
        tmp_path.chmod(0o500)
        places.append(tmp_path / "run")
    for place in places:
        with pytest.raises(CheckpointError, match="run cannot be written: ") as refused:
            train(adapted(tiny_folder), Batches(lambda: pytest.fail("trained")), CONFIG, output_dir=place)
        assert len(str(refused.value).splitlines()) == 1


def test_a_damaged_checkpoint_is_said_and_replaced(
    tiny_folder: Path, memory_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = memory_path / "run"
    whole = train(adapted(tiny_folder), Batches(), CONFIG, output_dir=run, progress=False)
    path = checkpoint_path(run, 4) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    resumed = train(adapted(tiny_folder), Batches(), CONFIG, output_dir=run, resume=True)
    said = "step-000004: optimizer.safetensors has another SHA-256"
    assert resumed.skipped == (said,) and f"step-000003; skipped {said}" in capsys.readouterr().err.replace("\n", "")
    assert resumed.losses == whole.losses and newest_intact_checkpoint(run) == (checkpoint_path(run, 4), [])


def test_resume_needs_a_run_or_nothing_and_another_run_leaves_no_checkpoints(
    tiny_folder: Path, memory_path: Path
) -> None:
    run, short = memory_path / "run", TrainConfig(steps=1, learning_rate=1e-2)
    (memory_path / "file.txt").touch()
    with pytest.raises(CheckpointError, match=r"does not hold a run to resume; it has file\.txt"):
        train(adapted(tiny_folder), Batches(), CONFIG, output_dir=memory_path, resume=True, progress=False)
    first = train(adapted(tiny_folder), Batches(), CONFIG, output_dir=run, resume=True, progress=False)
    assert first.resumed_from is None and len(first.steps) == 4
    again = train(adapted(tiny_folder), Batches(), CONFIG, output_dir=run, resume=True, progress=False)
    assert again.losses == first.losses and again.resumed_from == checkpoint_path(run, 4)
    train(adapted(tiny_folder), Batches(), short, output_dir=run, overwrite=True, progress=False)
    assert {path.name for path in run.iterdir()} == {"adapter", "events.jsonl", "metrics.jsonl"}
