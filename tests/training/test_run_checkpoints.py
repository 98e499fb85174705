"""Tests of the checkpoints of a run: written whole, the newest sound one found, damaged or foreign ones refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite.checkpoints.files import write_json
from qlora_lite.errors import CheckpointError
from qlora_lite.training.metrics import StepMetrics
from qlora_lite.training.run_checkpoints import (
    LINE_SHAPE,
    STATE_SHAPE,
    StoredRun,
    checkpoint_path,
    checkpoints_by_step,
    mismatches,
    newest_intact_checkpoint,
    remove_leftovers,
    remove_old_checkpoints,
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
    assert newest_intact_checkpoint(tmp_path) == (None, [])
    written(tmp_path, 3.0, 2.0)
    assert newest_intact_checkpoint(tmp_path) == (checkpoint_path(tmp_path, 2), [])
    damage(checkpoint_path(tmp_path, 2))
    found, skipped = newest_intact_checkpoint(tmp_path)
    assert found == checkpoint_path(tmp_path, 1) and len(skipped) == 1 and says in skipped[0]
    flip(checkpoint_path(tmp_path, 1) / "state.json")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint: step-000002: .*step-000001: .*start again"):
        newest_intact_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("step", "last", "best", "left"),
    [(5, 2, 0, [5, 4]), (5, 1, 2, [5, 3, 1]), (3, 1, 0, [3]), (5, None, 0, [5, 4, 3, 2, 1]), (4, 2, 9, [4, 3, 2, 1])],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, step: int, last: int, best: int, left: list[int]) -> None:
    written(tmp_path, 1.0, 5.0, 2.0, 4.0, 3.0)
    remove_old_checkpoints(tmp_path, step, last, best)
    assert list(checkpoints_by_step(tmp_path)) == left
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


def test_the_best_are_those_of_the_lowest_held_out_loss_where_there_is_one(tmp_path: Path) -> None:
    written(tmp_path, 1.0, 2.0, 3.0, 4.0, 5.0)
    for step, loss in ((1, 9.0), (2, None), (3, 7.0), (4, 8.0)):
        state = checkpoint_path(tmp_path, step) / "state.json"
        state.write_text(json.dumps({"mean_loss": float(step), "held_out_loss": loss}))
    remove_old_checkpoints(tmp_path, 5, 1, 2, "loss")
    assert list(checkpoints_by_step(tmp_path)) == [5, 4, 3]


def test_the_best_may_be_those_of_the_highest_exact_match(tmp_path: Path) -> None:
    written(tmp_path, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    for step, loss, score in ((1, 9.0, 0.5), (2, 1.0, 0.25), (3, 7.0, 0.5), (4, 8.0, 0.75), (5, 0.5, None)):
        state = checkpoint_path(tmp_path, step) / "state.json"
        state.write_text(json.dumps({"mean_loss": float(step), "held_out_loss": loss, "exact_match": score}))
    remove_old_checkpoints(tmp_path, 6, 1, 2, "exact_match")
    assert list(checkpoints_by_step(tmp_path)) == [6, 4, 3]


def test_what_was_left_half_way_goes(tmp_path: Path) -> None:
    written(tmp_path, 1.0)
    (tmp_path / "checkpoints" / ".step-000002.x.partial").mkdir()
    (tmp_path / ".metrics.jsonl.x.partial").touch()
    (tmp_path / ".mine.partial").touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.rglob(".*")} == {".mine.partial"}
    assert list(checkpoints_by_step(tmp_path)) == [1]


@pytest.fixture(scope="module")
def fuzz_targets(import_script: Callable[[str], Any]) -> Any:
    return import_script("tests/reliability/fuzz_targets.py")


@pytest.fixture
def folder(tmp_path: Path, fuzz_targets: Any) -> Path:
    """A sound checkpoint of one step."""
    for name, data in fuzz_targets.sound_run().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_sound_one_is_read_whole(folder: Path) -> None:
    found = StoredRun.read(folder)
    assert found.state["step"] == len(found.metrics) == 1
    assert {"first.lora_A", "second.lora_B"} <= found.trained.keys()
    assert found.position.taken == 1 and set(found.random.tensors) == set(found.position.random.tensors) == {"torch"}


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("version", 2, "is of version 2; this one reads 1"),
        ("settings", None, "not the state of a run: missing or of a wrong type: settings"),
        ("batches", {"epoch": 0}, "wrong type: batches.taken, batches.digest, batches.count"),
        (
            "random",
            {"now": {"python": [3, [], 0.5]}},
            "not the state of a run: missing or of a wrong type: random.epoch",
        ),
        (
            "facts",
            {"own_loss_because": None, "dial": [1, 2], "halved_at": "x"},
            "wrong type: facts.dial, facts.halved_at",
        ),
        ("step", 2, "should have a line for each of 2 steps; 1 lines"),
    ],
)
def test_another_state_is_refused_and_named(folder: Path, key: str, value: Any, sentence: str) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, key: value}))
    with pytest.raises(CheckpointError) as refused:
        StoredRun.read(folder)
    assert sentence in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("line", [b"[1]", b'{"step": 1}', b"\xff", b"{", b"[" * 100_000, b'{"step": 1, "loss": "x"}'])
def test_other_lines_than_steps_are_refused(folder: Path, line: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(line)
    with pytest.raises(CheckpointError, match=r"line 1 is not a step|cannot be read as lines of JSON"):
        StoredRun.read(folder)


def test_shapes_tell_what_differs() -> None:
    shape = {"a": int, "b": [float, (str, type(None))], "c": {"d": list}}
    assert not list(mismatches({"a": 1, "b": [2, None], "c": {"d": []}, "more": 1}, shape))
    assert list(mismatches({"a": "1", "b": [None, 3], "c": []}, shape)) == ["a", "b[0]", "b[1]", "c"]
    assert list(mismatches({"a": 1, "b": [1.5]}, shape)) == ["b", "c"]
    assert LINE_SHAPE.keys() <= StepMetrics.__annotations__.keys() and STATE_SHAPE["mean_loss"] is float


def test_what_is_another_run_is_refused_where_it_is_used(fuzz_targets: Any, folder: Path) -> None:
    run = fuzz_targets.fresh_run()
    plain = json.loads((folder / "state.json").read_text())
    refused = "the random states of the run do not fit these generators: "
    changes = {
        "optimizer": ({"first.lora_A.step": {"same_as": "nothing"}}, "is that of 'nothing', which is not there"),
        "random": (
            {**plain["random"], "now": {"python": [3, [1, 2], None]}},
            f"{refused}state vector is the wrong size",
        ),
    }
    long = plain["random"]["now"]["python"]
    for number, numpy in enumerate(([[1] * 380, 5, 0, 0.0], [[1] * 624, 2**20, 0, 0.0], [[1] * 624, -1, 0, 0.0], [5])):
        value = {**plain["random"], "now": {"python": long, "numpy": numpy}}
        changes[f"random {number}"] = (value, f"{refused}(numpy's has|not enough values)")
    for name, (value, sentence) in changes.items():
        key = name.split()[0]
        (folder / "state.json").write_text(json.dumps({**plain, key: value}))
        with pytest.raises(CheckpointError, match=sentence):
            run.restore_(folder)
            run.restore_random()
        run = fuzz_targets.fresh_run()
    tensors = fuzz_targets.safetensors.torch.load((folder / "optimizer.safetensors").read_bytes())
    tensors["first.lora_A.exp_avg"] = torch.zeros(3)
    fuzz_targets.safetensors.torch.save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(plain))
    with pytest.raises(
        CheckpointError, match=r"first\.lora_A\.exp_avg is of shape \(3,\), and first\.lora_A is \(2, 6\)"
    ):
        run.restore_(folder)
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl has a line with missing or unknown keys: gradient_norm, "
    ):
        StepMetrics.read({"step": 1, "loss": 1.0})
