"""The checkpoints of a run, `checkpoints/step-000120`: whole or not there, the newest sound one found, others let go.

A checkpoint is written beside its place and synced; a manifest with the size and SHA-256 of every file is its last
file; then it is renamed. One that was damaged later is told by the manifest, and an older one serves.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_lite.checkpoints.atomic_folder import new_folder
from qlora_lite.checkpoints.files import UNFINISHED, read_json, sync, write_json
from qlora_lite.errors import CheckpointError
from qlora_lite.signals import poll
from qlora_lite.stored_state import ADAPTER_FOLDER, METRICS_FILE, STATE_FILE

CHECKPOINTS = "checkpoints"
MANIFEST_FILE = "manifest.json"
READ_BYTES = 4 << 20
NAME = re.compile(r"step-(\d{6,})")


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
                poll()
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
