"""Exports and packed checkpoints that are killed while they are written. Run by endure.py.

At each write, sync, rename and removal, and in the middle of writes, onto a folder that was not there and onto one that
is replaced: afterwards the folder is the old one whole, the new one whole, or not there, and the same call finishes
with the files of a call that was not disturbed.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from kill_points import arm, ended

from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_quantized, storage
from qlora_lite.quantized_files import save_quantized

SHARD_BYTES = 40_000  # several files


@dataclass(frozen=True)
class Save:
    """One way of writing a folder; replaces: whether another one stands there before."""

    name: str
    write: Callable[[Path, Path, bool], object]
    replaces: bool


def _export(model: Path, folder: Path, overwrite: bool) -> None:
    loaded = load_quantized(model, QuantConfig())
    torch.manual_seed(0)
    add_lora_(loaded, LoraConfig(rank=2, init="gaussian"))
    export_merged(loaded, folder, max_shard_bytes=SHARD_BYTES, overwrite=overwrite)


def _quantized(model: Path, folder: Path, overwrite: bool) -> None:
    save_quantized(load_quantized(model, QuantConfig()), folder, max_shard_bytes=SHARD_BYTES, overwrite=overwrite)


SAVES = tuple(
    Save(f"{name}{' over another' if replaces else ''}", write, replaces)
    for name, write in (("export", _export), ("packed checkpoint", _quantized))
    for replaces in (False, True)
)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def _work(save: Save, model: Path, place: Path, point: int | None) -> None:
    torch.set_num_threads(1)
    if point is not None:
        arm(point, place)
    else:
        storage.ABANDONED_AFTER_SECONDS = -1  # what the killed one left is old enough
    save.write(model, place / "out", save.replaces)


def killed_saves(model: Path, place: Path, save: Save, every: int) -> Iterator[tuple[int, list[str]]]:
    """(point, what was wrong) for a kill at each `every`th change of the disk."""
    old: dict[str, bytes] = {}
    if save.replaces:
        _work(
            next(other for other in SAVES if other.write is not save.write and not other.replaces), model, place, None
        )
        old = files_of(place / "out")
        shutil.copytree(place / "out", place.parent / "old")
    if ended(functools.partial(_work, save, model, place, None)) != 0:
        raise SystemExit(f"an undisturbed {save.name} failed")
    wanted = files_of(place / "out")
    for point in itertools.count(0, every):
        shutil.rmtree(place)
        place.mkdir()
        if save.replaces:
            shutil.copytree(place.parent / "old", place / "out")
        status = ended(functools.partial(_work, save, model, place, point))
        if status == 0:
            break
        found = files_of(place / "out")
        problems = [] if status == -signal.SIGKILL else [f"it ended with {status}"]
        if found not in (old, wanted):
            problems.append("half of it stands under the name")
        finishing = Save(save.name, save.write, replaces=bool(found))
        if ended(functools.partial(_work, finishing, model, place, None)) != 0:
            problems.append("the same call does not finish")
        elif files_of(place / "out") != wanted or len(list(place.iterdir())) != 1:
            problems.append("it finishes with other files")
        yield point, problems
    shutil.rmtree(place.parent / "old", ignore_errors=True)
