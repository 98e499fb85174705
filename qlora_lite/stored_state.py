"""What a checkpoint of a run says, read and checked before any of it is used. (Which files there are: run_state.py.)

Sums tell a damaged file from a whole one, and say nothing of who wrote it: what a stranger made is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_lite.checkpoints.files import excerpt, read_json
from qlora_lite.checkpoints.safetensors_read import read_safetensors
from qlora_lite.compute.random_state import RandomState
from qlora_lite.data.stream import Position
from qlora_lite.errors import CheckpointError

VERSION = 1
STATE_FILE = "state.json"
TRAINED_FILE = "trained.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
METRICS_FILE = "metrics.jsonl"
ADAPTER_FOLDER = "adapter"
NOW, EPOCH = "now.", "epoch."
NONE = type(None)
SHOWN = 4

# A dict has at least these keys, a list has these elements, a tuple lists what a value may be.
BATCHES_SHAPE = {"epoch": int, "taken": int, "digest": str, "count": (int, NONE)}
RANDOM_SHAPE = {"python": [int, list, (float, NONE)]}
STATE_SHAPE = {
    "step": int,
    "mean_loss": float,
    **dict.fromkeys(("settings", "adapters", "base", "machine", "optimizer"), dict),
    "checkpointing": (str, int),
    "batches": BATCHES_SHAPE,
    "random": {"now": RANDOM_SHAPE, "epoch": RANDOM_SHAPE},
    "facts": {"own_loss_because": (str, NONE), "dial": ([int] * 5, NONE), "halved_at": (int, NONE)},
}
LINE_SHAPE = {"step": int, "loss": float}


def unlike(value: Any, shape: Any, name: str = "") -> Iterator[str]:
    """The names of the values inside `value` that are not of the shape; `name`: its own."""
    if isinstance(shape, tuple):
        if all(list(unlike(value, one)) for one in shape):
            yield name
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            yield name
            return
        for key, part in shape.items():
            yield from unlike(value.get(key, ...), part, f"{name}.{key}" if name else key)
    elif isinstance(shape, list):
        if not isinstance(value, list) or len(value) != len(shape):
            yield name
            return
        for number, (one, part) in enumerate(zip(value, shape, strict=True)):
            yield from unlike(one, part, f"{name}[{number}]")
    elif not isinstance(value, (int, float) if shape is float else shape):
        yield name


def read_state_file(folder: Path) -> dict[str, Any]:
    """state.json. CheckpointError for one of another version, or that says something else than a run's does."""
    path = folder / STATE_FILE
    state = read_json(path)
    if state.get("version") != VERSION:
        raise CheckpointError(f"{folder} is of version {excerpt(state.get('version'))}; this one reads {VERSION}")
    if wrong := list(unlike(state, STATE_SHAPE)):
        shown = ", ".join(wrong[:SHOWN]) + (" …" if len(wrong) > SHOWN else "")
        raise CheckpointError(f"{path} is no state of a run: {shown} is missing, or not what it should be")
    return state


def _read_metrics(path: Path, steps: int) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise CheckpointError(f"{path} cannot be read as lines of JSON: {error}") from error
    bad = [number for number, line in enumerate(lines, 1) if list(unlike(line, LINE_SHAPE))]
    if bad or len(lines) != steps:
        what = f"line {bad[0]} is no step" if bad else f"{len(lines)} lines"
        raise CheckpointError(f"{path} should have a line for each of {steps} steps; {what}")
    return lines


@dataclass(frozen=True)
class StoredState:
    """All of a checkpoint but its adapter/. plain: state.json."""

    plain: dict[str, Any]
    trained: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    now: RandomState
    position: Position
    metrics: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> StoredState:
        """CheckpointError for what is no checkpoint of a run."""
        plain = read_state_file(folder)
        tensors = read_safetensors(folder / RANDOM_FILE)
        now, epoch = (
            RandomState(
                {name.removeprefix(mark): value for name, value in tensors.items() if name.startswith(mark)},
                plain["random"][mark.rstrip(".")],
            )
            for mark in (NOW, EPOCH)
        )
        place = {name: plain["batches"][name] for name in BATCHES_SHAPE}
        return cls(
            plain,
            read_safetensors(folder / TRAINED_FILE),
            read_safetensors(folder / OPTIMIZER_FILE),
            now,
            Position(start=epoch, **place),
            _read_metrics(folder / METRICS_FILE, plain["step"]),
        )
