"""Checkpoints are whole, found newest first, told to be damaged, and let go by rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lite.checkpoints.files import write_json
from qlora_lite.errors import CheckpointError
from qlora_lite.training.run_checkpoints import (
    checkpoint_path,
    checkpoints,
    keep_only,
    newest_sound,
    remove_unfinished,
    write_checkpoint,
)


def written(run: Path, *losses: float) -> None:
    def fill(step: int, loss: float) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            (folder / "adapter").mkdir()
            (folder / "adapter" / "a.json").write_text(f"{step}")
            write_json(folder / "state.json", {"mean_loss": loss})

        return write

    for step, loss in enumerate(losses, 1):
        write_checkpoint(checkpoint_path(run, step), fill(step, loss))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: flip(folder / "adapter" / "a.json"), "step-000002: adapter/a.json has another SHA-256"),
        (lambda folder: (folder / "state.json").write_text("{"), "step-000002: state.json has another size"),
        (lambda folder: (folder / "adapter" / "a.json").unlink(), "step-000002: adapter/a.json is missing"),
        (lambda folder: (folder / "b.json").touch(), "step-000002: b.json does not belong to it"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "step-000002: manifest.json lists no files"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json does not exist"),
    ],
)
def test_a_damaged_one_is_skipped_and_said(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    assert newest_sound(tmp_path) == (None, [])
    written(tmp_path, 3.0, 2.0)
    assert newest_sound(tmp_path) == (checkpoint_path(tmp_path, 2), [])
    damage(checkpoint_path(tmp_path, 2))
    found, skipped = newest_sound(tmp_path)
    assert found == checkpoint_path(tmp_path, 1) and len(skipped) == 1 and says in skipped[0]
    flip(checkpoint_path(tmp_path, 1) / "state.json")
    with pytest.raises(CheckpointError, match=r"no sound checkpoint: step-000002: .*step-000001: .*begin again"):
        newest_sound(tmp_path)


@pytest.mark.parametrize(
    ("step", "last", "best", "left"),
    [(5, 2, 0, [5, 4]), (5, 1, 2, [5, 3, 1]), (3, 1, 0, [3]), (5, None, 0, [5, 4, 3, 2, 1]), (4, 2, 9, [4, 3, 2, 1])],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, step: int, last: int, best: int, left: list[int]) -> None:
    written(tmp_path, 1.0, 5.0, 2.0, 4.0, 3.0)
    keep_only(tmp_path, step, last, best)
    assert list(checkpoints(tmp_path)) == left
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


def test_what_was_left_half_way_goes(tmp_path: Path) -> None:
    written(tmp_path, 1.0)
    (tmp_path / "checkpoints" / ".step-000002.x.partial").mkdir()
    (tmp_path / ".metrics.jsonl.x.partial").touch()
    (tmp_path / ".mine.partial").touch()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.rglob(".*")} == {".mine.partial"}
    assert list(checkpoints(tmp_path)) == [1]
