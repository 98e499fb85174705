"""The checkpoints of a run, `checkpoints/step-000120`: written whole, verified, found and removed.

A checkpoint is written under a temporary name in the same folder and synced to disk. Its last file is a manifest with
the size and the SHA-256 of every other file; then the folder is renamed. A checkpoint that was damaged later does not
match its manifest, and an older one is used.
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
from typing import TypedDict, cast

from torch import Tensor

from qlora_lite.checkpoints.atomic_folder import new_folder
from qlora_lite.checkpoints.files import UNFINISHED, excerpt, read_json, rename, sync, write_json
from qlora_lite.checkpoints.safetensors_read import read_safetensors
from qlora_lite.compute.random_state import RandomState
from qlora_lite.data.stream import Position
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.signals import check_signals
from qlora_lite.training.config import EXACT_MATCH
from qlora_lite.training.decisions import ABSENT, DECISIONS_SHAPE, NONE, DecisionsJson
from qlora_lite.training.metrics import Evaluation, StepMetrics, is_evaluation, rank

VERSION = 1
CHECKPOINTS = "checkpoints"
NAME = re.compile(r"step-(\d{6,})")

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
TRAINED_FILE = "trained.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
METRICS_FILE = "metrics.jsonl"
ADAPTER_FOLDER = "adapter"
BEST_FOLDER = "best_adapter"
DATA_FILE = "data.json"
RUN_FILE = "run.yaml"

# Prefixes of the tensors in RANDOM_FILE: the generators after the last step, and before the first batch of its epoch.
NOW, EPOCH = "now.", "epoch."
READ_BYTES = 4 << 20
SHOWN = 4

# The shape of a JSON value: a dict lists the keys that it must have, a list its elements, a tuple the alternatives.
BATCHES_SHAPE = {"epoch": int, "taken": int, "digest": str, "count": (int, NONE)}
RANDOM_SHAPE = {"python": [int, list, (float, NONE)]}
STATE_SHAPE = {
    "step": int,
    "mean_loss": float,
    **dict.fromkeys(("settings", "adapters", "base", "machine", "optimizer"), dict),
    "checkpointing": (str, int),
    "batches": BATCHES_SHAPE,
    "random": {"now": RANDOM_SHAPE, "epoch": RANDOM_SHAPE},
    "facts": DECISIONS_SHAPE,
    # Runs of before held-out batches were evaluated during training lack these.
    "held_out_loss": (float, NONE, ABSENT),
    EXACT_MATCH: (float, NONE, ABSENT),
    "held_out_batches": (str, NONE, ABSENT),
}
LINE_SHAPE = {"step": int, "loss": float}


class StateFile(TypedDict):
    """The content of state.json."""

    version: int
    step: int
    mean_loss: float
    settings: dict[str, object]
    adapters: dict[str, object]
    base: dict[str, object]
    machine: dict[str, object]
    checkpointing: str | int
    batches: dict[str, object]
    random: dict[str, dict[str, object]]
    optimizer: dict[str, object]
    facts: DecisionsJson
    held_out_loss: float | None
    exact_match: float | None
    held_out_batches: str | None


class _FileSum(TypedDict):
    bytes: int
    sha256: str


def checkpoint_path(run: Path, step: int) -> Path:
    """Returns the path of the checkpoint of a step, which need not exist."""
    return run / CHECKPOINTS / f"step-{step:06d}"


def checkpoints_by_step(run: Path) -> dict[int, Path]:
    """Returns the checkpoints of a run by step, the newest first, intact or not."""
    folder = run / CHECKPOINTS
    found = {int(name[1]): path for path in folder.glob("step-*") if (name := NAME.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def _file_sums(folder: Path) -> dict[str, _FileSum]:
    """Returns {name: size and SHA-256} of every file in a folder, without its manifest."""
    sums: dict[str, _FileSum] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE):
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while piece := file.read(READ_BYTES):
                check_signals()
                digest.update(piece)
        sums[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return sums


def write_checkpoint(target: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with an empty folder, which gets the name `target` once it is complete and on disk."""
    target.parent.mkdir(exist_ok=True)
    sync(target.parent.parent)
    with new_folder(target, overwrite=True) as folder:
        write(folder)
        write_json(folder / MANIFEST_FILE, {"files": _file_sums(folder)})


def checkpoint_problem(folder: Path) -> str | None:
    """Returns how a checkpoint differs from its manifest, as a short text; None if it is intact."""
    try:
        listed = read_json(folder / MANIFEST_FILE).get("files")
        if not isinstance(listed, dict) or STATE_FILE not in listed:
            return f"{MANIFEST_FILE} lists no files"
        found = _file_sums(folder)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    for name in sorted({*listed, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} does not belong to it"
        if not isinstance(listed[name], dict) or found[name]["bytes"] != listed[name].get("bytes"):
            return f"{name} has another size"
        if found[name]["sha256"] != listed[name].get("sha256"):
            return f"{name} has another SHA-256"
    return None


def newest_intact_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint that matches its manifest, and a text about each newer one that does not.

    (None, []) for a run without checkpoints. Raises CheckpointError if there are checkpoints and all are damaged.
    """
    skipped: list[str] = []
    for path in checkpoints_by_step(run).values():
        problem = checkpoint_problem(path)
        if problem is None:
            return path, skipped
        skipped.append(f"{path.name}: {problem}")
    if skipped:
        raise CheckpointError(
            f"{run / CHECKPOINTS} has no intact checkpoint: {'; '.join(skipped)}; start again with overwrite"
        )
    return None, []


def is_run(folder: Path) -> bool:
    """Whether a path is the folder of a run, or was."""
    return any((folder / name).is_file() for name in (RUN_FILE, METRICS_FILE))


def remove_folder(path: Path) -> None:
    """Removes a folder. It is renamed first, so that an incomplete folder never has its name."""
    gone = path.with_name(f".{path.name}.gone{UNFINISHED}")
    shutil.rmtree(gone, ignore_errors=True)
    rename(path, gone)
    shutil.rmtree(gone)


def leftovers(run: Path) -> list[Path]:
    """Returns the files and folders that a killed run left partly written or partly removed."""
    top = [*run.glob(f".{ADAPTER_FOLDER}.*{UNFINISHED}"), *run.glob(f".{BEST_FOLDER}.*{UNFINISHED}")]
    top += [path for name in (METRICS_FILE, RUN_FILE) for path in run.glob(f".{name}.*{UNFINISHED}")]
    return [*top, *run.glob(f".{CHECKPOINTS}.*{UNFINISHED}"), *run.glob(f"{CHECKPOINTS}/.step-*{UNFINISHED}")]


def remove_leftovers(run: Path) -> None:
    """Removes the leftovers of a killed run. Only the holder of the run's lock may call it."""
    for path in leftovers(run):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _rank(path: Path, by: str | None) -> tuple[float, float]:
    """Returns what checkpoints are compared by: that of the best is the smallest, infinity if it is not known."""
    try:
        state = read_json(path / STATE_FILE)
        if by is None:
            return 0.0, float(state["mean_loss"])
        exact_match = state.get(EXACT_MATCH)
        return rank(float(state["held_out_loss"]), None if exact_match is None else float(exact_match), by)
    except (CheckpointError, KeyError, TypeError, ValueError):
        return math.inf, math.inf


def remove_old_checkpoints(run: Path, step: int, last: int | None, best: int, by: str | None = None) -> None:
    """Keeps the newest `last` checkpoints (None: all) and the `best` of the others; removes the rest.

    by: `best_by` of TrainConfig, by which evaluations are compared; None goes by the mean loss of the steps before.
    Checkpoints after `step`, the one just written, are of steps that were undone by resuming, and are removed.
    """
    found = checkpoints_by_step(run)
    for number in [number for number in found if number > step]:
        remove_folder(found.pop(number))
    older = list(found.values())[last:] if last is not None else []
    for path in sorted(older, key=lambda path: _rank(path, by))[best:]:
        remove_folder(path)


def mismatches(value: object, shape: object, name: str = "") -> Iterator[str]:
    """Yields the names of the values in `value` that do not have the shape (see NONE above); `name` is its own name."""
    if isinstance(shape, tuple):
        if all(list(mismatches(value, alternative)) for alternative in shape):
            yield name
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            yield name
            return
        for key, part in shape.items():
            yield from mismatches(value.get(key, ...), part, f"{name}.{key}" if name else key)
    elif isinstance(shape, list):
        if not isinstance(value, list) or len(value) != len(shape):
            yield name
            return
        for number, (element, part) in enumerate(zip(value, shape, strict=True)):
            yield from mismatches(element, part, f"{name}[{number}]")
    elif isinstance(shape, type) and not isinstance(value, (int, float) if shape is float else shape):
        yield name


def read_state_file(folder: Path) -> StateFile:
    """Returns the content of state.json. Raises CheckpointError if its version or its shape is another."""
    path = folder / STATE_FILE
    state = read_json(path)
    if state.get("version") != VERSION:
        raise CheckpointError(f"{folder} is of version {excerpt(state.get('version'))}; this one reads {VERSION}")
    if wrong := list(mismatches(state, STATE_SHAPE)):
        raise CheckpointError(f"{path} is not the state of a run: missing or of a wrong type: {listing(wrong, SHOWN)}")
    return cast(StateFile, state)


def _read_metrics(path: Path, steps: int) -> tuple[list[StepMetrics], list[Evaluation]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise CheckpointError(f"{path} cannot be read as lines of JSON: {error}") from error
    of_steps = {number: line for number, line in enumerate(lines, 1) if not is_evaluation(line)}
    bad = [number for number, line in of_steps.items() if list(mismatches(line, LINE_SHAPE))]
    if bad or len(of_steps) != steps:
        found = f"line {bad[0]} is not a step" if bad else f"{len(of_steps)} lines"
        raise CheckpointError(f"{path} should have a line for each of {steps} steps; {found}")
    evaluations = [Evaluation.read(line) for line in lines if is_evaluation(line)]
    return [StepMetrics.read(line) for line in of_steps.values()], evaluations


@dataclass(frozen=True)
class StoredRun:
    """The content of a checkpoint, without its adapter/.

    random: states of the generators after the last step. position: in the batches.
    """

    state: StateFile
    trained: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: RandomState
    position: Position
    metrics: list[StepMetrics]
    evaluations: list[Evaluation]

    @classmethod
    def read(cls, folder: Path) -> StoredRun:
        """Reads a checkpoint. Raises CheckpointError if a file is not that of a run's checkpoint."""
        state = read_state_file(folder)
        tensors = read_safetensors(folder / RANDOM_FILE)
        now, epoch = (
            RandomState(
                {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)},
                state["random"][prefix.rstrip(".")],
            )
            for prefix in (NOW, EPOCH)
        )
        return cls(
            state,
            read_safetensors(folder / TRAINED_FILE),
            read_safetensors(folder / OPTIMIZER_FILE),
            now,
            Position.from_json(state["batches"], epoch),
            *_read_metrics(folder / METRICS_FILE, state["step"]),
        )
