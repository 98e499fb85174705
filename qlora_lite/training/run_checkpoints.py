"""The checkpoints of a run, `checkpoints/step-000120`: whole or not there, the newest sound one found, others let go.

A checkpoint is written beside its place and synced; a manifest with the size and SHA-256 of every file is its last
file; then it is renamed. One that was damaged later is told by the manifest, and an older one serves.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_lite.checkpoints.atomic_folder import new_folder
from qlora_lite.checkpoints.files import UNFINISHED, excerpt, read_json, sync, write_json
from qlora_lite.checkpoints.safetensors_read import read_safetensors
from qlora_lite.compute.random_state import RandomState
from qlora_lite.data.stream import Position
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.signals import check_signals

CHECKPOINTS = "checkpoints"
MANIFEST_FILE = "manifest.json"
READ_BYTES = 4 << 20
NAME = re.compile(r"step-(\d{6,})")

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


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run / CHECKPOINTS / f"step-{step:06d}"


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, the newest first, sound or not."""
    folder = run / CHECKPOINTS
    found = {int(name[1]): path for path in folder.glob("step-*") if (name := NAME.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: size and SHA-256} of every file below a folder but its manifest."""
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE):
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while piece := file.read(READ_BYTES):
                check_signals()
                digest.update(piece)
        sums[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return sums


def write_checkpoint(target: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a checkpoint's folder, which is there under its name once it is whole and on the disk."""
    target.parent.mkdir(exist_ok=True)
    sync(target.parent.parent)
    with new_folder(target, overwrite=True) as folder:
        write(folder)
        write_json(folder / MANIFEST_FILE, {"files": _files(folder)})


def what_is_wrong(folder: Path) -> str | None:
    """In what a checkpoint is not what its manifest says; None if it is sound."""
    try:
        listed = read_json(folder / MANIFEST_FILE).get("files")
        if not isinstance(listed, dict) or STATE_FILE not in listed:
            return f"{MANIFEST_FILE} lists no files"
        found = _files(folder)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    for name in sorted({*listed, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} does not belong to it"
        for key, what in (("bytes", "another size"), ("sha256", "another SHA-256")):
            if not isinstance(listed[name], dict) or found[name][key] != listed[name].get(key):
                return f"{name} has {what}"
    return None


def newest_sound(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, and a sentence for each newer one that is not.

    (None, []) for a run without checkpoints. CheckpointError if there are some and none is sound.
    """
    skipped: list[str] = []
    for path in checkpoints(run).values():
        wrong = what_is_wrong(path)
        if wrong is None:
            return path, skipped
        skipped.append(f"{path.name}: {wrong}")
    if skipped:
        raise CheckpointError(
            f"{run / CHECKPOINTS} has no sound checkpoint: {'; '.join(skipped)}; begin again with overwrite"
        )
    return None, []


def remove_folder(path: Path) -> None:
    """Takes a folder's name away first, so that no half of it ever stands under that."""
    gone = path.with_name(f".{path.name}.gone{UNFINISHED}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def unfinished(run: Path) -> list[Path]:
    """What a killed run left half-written or half-removed."""
    here = [*run.glob(f".{ADAPTER_FOLDER}.*{UNFINISHED}"), *run.glob(f".{METRICS_FILE}.*{UNFINISHED}")]
    return [*here, *run.glob(f".{CHECKPOINTS}.*{UNFINISHED}"), *run.glob(f"{CHECKPOINTS}/.step-*{UNFINISHED}")]


def remove_unfinished(run: Path) -> None:
    """Removes that; only for the owner of the run's lock."""
    for left in unfinished(run):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _mean_loss(path: Path) -> float:
    """That of the steps before a checkpoint; infinite for one that cannot be read, and need not be kept."""
    try:
        return float(read_json(path / STATE_FILE)["mean_loss"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return math.inf


def keep_only(run: Path, step: int, last: int | None, best: int) -> None:
    """Removes checkpoints but the newest `last` and of the others the `best` by loss, now that `step` was written.

    What is newer than that comes from steps that were taken back, and goes.
    """
    found = checkpoints(run)
    for number in [number for number in found if number > step]:
        remove_folder(found.pop(number))
    older = list(found.values())[last:] if last is not None else []
    for path in sorted(older, key=_mean_loss)[best:]:
        remove_folder(path)


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
        shown = listing(wrong, SHOWN)
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
