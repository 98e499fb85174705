"""What a checkpoint of a run says: other files than a run's, with sums that are right, are refused by one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite.errors import CheckpointError
from qlora_lite.training.run_checkpoints import LINE_SHAPE, STATE_SHAPE, StoredState, unlike
from qlora_lite.training.step import StepMetrics


@pytest.fixture(scope="module")
def fuzz_targets(profiling_script: Callable[[str], Any]) -> Any:
    return profiling_script("fuzz_targets")


@pytest.fixture
def folder(tmp_path: Path, fuzz_targets: Any) -> Path:
    """A sound checkpoint of one step."""
    for name, data in fuzz_targets.sound_run().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_sound_one_is_read_whole(folder: Path) -> None:
    found = StoredState.read(folder)
    assert found.plain["step"] == len(found.metrics) == 1
    assert {"first.lora_A", "second.lora_B"} <= found.trained.keys()
    assert found.position.taken == 1 and set(found.now.tensors) == set(found.position.start.tensors) == {"torch"}


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("version", 2, "is of version 2; this one reads 1"),
        ("settings", None, "no state of a run: settings is missing, or not what it should be"),
        ("batches", {"epoch": 0}, "no state of a run: batches.taken, batches.digest, batches.count is"),
        ("random", {"now": {"python": [3, [], 0.5]}}, "no state of a run: random.epoch is"),
        ("facts", {"own_loss_because": None, "dial": [1, 2], "halved_at": "x"}, "facts.dial, facts.halved_at is"),
        ("step", 2, "should have a line for each of 2 steps; 1 lines"),
    ],
)
def test_another_state_is_refused_and_named(folder: Path, key: str, value: Any, sentence: str) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, key: value}))
    with pytest.raises(CheckpointError) as refused:
        StoredState.read(folder)
    assert sentence in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("line", [b"[1]", b'{"step": 1}', b"\xff", b"{", b"[" * 100_000, b'{"step": 1, "loss": "x"}'])
def test_other_lines_than_steps_are_refused(folder: Path, line: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(line)
    with pytest.raises(CheckpointError, match=r"line 1 is no step|cannot be read as lines of JSON"):
        StoredState.read(folder)


def test_shapes_tell_what_differs() -> None:
    shape = {"a": int, "b": [float, (str, type(None))], "c": {"d": list}}
    assert not list(unlike({"a": 1, "b": [2, None], "c": {"d": []}, "more": 1}, shape))
    assert list(unlike({"a": "1", "b": [None, 3], "c": []}, shape)) == ["a", "b[0]", "b[1]", "c"]
    assert list(unlike({"a": 1, "b": [1.5]}, shape)) == ["b", "c"]
    assert LINE_SHAPE.keys() <= StepMetrics.__annotations__.keys() and STATE_SHAPE["mean_loss"] is float


def test_what_is_another_run_is_refused_where_it_is_used(fuzz_targets: Any, folder: Path) -> None:
    state = fuzz_targets.fresh_state()
    plain = json.loads((folder / "state.json").read_text())
    changes = {
        "optimizer": ({"first.lora_A.step": {"same_as": "nothing"}}, "is that of 'nothing', which is not there"),
        "random": (
            {**plain["random"], "now": {"python": [3, [1, 2], None]}},
            "none of these generators: state vector is the wrong size",
        ),
    }
    long = plain["random"]["now"]["python"]
    for number, numpy in enumerate(([[1] * 380, 5, 0, 0.0], [[1] * 624, 2**20, 0, 0.0], [[1] * 624, -1, 0, 0.0], [5])):
        value = {**plain["random"], "now": {"python": long, "numpy": numpy}}
        changes[f"random {number}"] = (value, "none of these generators: (numpy's has|not enough values)")
    for name, (value, sentence) in changes.items():
        key = name.split()[0]
        (folder / "state.json").write_text(json.dumps({**plain, key: value}))
        with pytest.raises(CheckpointError, match=sentence):
            state.restore_(folder)
            state.restore_random()
        state = fuzz_targets.fresh_state()
    tensors = fuzz_targets.safetensors.torch.load((folder / "optimizer.safetensors").read_bytes())
    tensors["first.lora_A.exp_avg"] = torch.zeros(3)
    fuzz_targets.safetensors.torch.save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(plain))
    with pytest.raises(
        CheckpointError, match=r"first\.lora_A\.exp_avg is of shape \(3,\), and first\.lora_A is \(2, 6\)"
    ):
        state.restore_(folder)
    with pytest.raises(CheckpointError, match="a line of the run's metrics is no step: gradient_norm, "):
        StepMetrics.read({"step": 1, "loss": 1.0})
