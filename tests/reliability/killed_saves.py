"""Exports, merges and packed checkpoints that are killed while they are written. Run by endure.py.

At each write, sync, rename and removal, in the middle of writes, and at random times, onto a folder that was not there
and onto one that is replaced: afterwards the folder is the old one whole, the new one whole, or not there, and the same
call finishes with the files of a call that was not disturbed.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kill_points import Kill, all_kills, ended
from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_quantized, save_adapter
from qlora_lite.checkpoints import atomic_folder
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.export.quantized import save_quantized
from qlora_lite.lora.adapters import lora_layers

SHARD_BYTES = 40_000  # several files


@dataclass(frozen=True)
class Save:
    """One way of writing a folder; replaces: whether another one stands there before."""

    name: str
    write: Callable[[Path, Path, bool], object]
    replaces: bool


def _adapted(model: Path) -> torch.nn.Module:
    loaded = load_quantized(model, QuantConfig())
    torch.manual_seed(0)
    add_lora_(loaded, LoraConfig(rank=2))
    for layer in lora_layers(loaded).values():
        torch.nn.init.normal_(layer.lora_B)
    return loaded


def _export(model: Path, folder: Path, overwrite: bool) -> None:
    export_merged(_adapted(model), folder, max_shard_bytes=SHARD_BYTES, overwrite=overwrite)


def _merge(model: Path, folder: Path, overwrite: bool) -> None:
    adapter = model.with_name(f"{model.name}_adapter")
    if not adapter.exists():
        save_adapter(_adapted(model), adapter)
    merge_checkpoint(model, adapter, folder, QuantConfig(), max_shard_bytes=SHARD_BYTES, overwrite=overwrite)


def _quantized(model: Path, folder: Path, overwrite: bool) -> None:
    save_quantized(load_quantized(model, QuantConfig()), folder, max_shard_bytes=SHARD_BYTES, overwrite=overwrite)


SAVES = tuple(
    Save(f"{name}{' over another' if replaces else ''}", write, replaces)
    for name, write in (("export", _export), ("merge", _merge), ("packed checkpoint", _quantized))
    for replaces in (False, True)
)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def _work(save: Save, model: Path, place: Path, abandoned: bool) -> None:
    torch.set_num_threads(1)
    if abandoned:
        atomic_folder.ABANDONED_AFTER_SECONDS = -1  # what a killed one left is old enough
    save.write(model, place / "out", save.replaces)


def _killed_and_done_again(
    save: Save, model: Path, place: Path, old: Path | None, wanted: dict[str, bytes], kill: Kill
) -> tuple[int, list[str]]:
    """How a save ended that was to be killed, and what was wrong then. old: the folder that it replaces."""
    shutil.rmtree(place)
    place.mkdir()
    if old is not None:
        shutil.copytree(old, place / "out")
    status = ended(functools.partial(_work, save, model, place, False), kill)
    found, problems = files_of(place / "out"), []
    if found not in ({} if old is None else files_of(old), wanted):
        problems.append("half of it stands under the name")
    finishing = Save(save.name, save.write, replaces=bool(found))
    if ended(functools.partial(_work, finishing, model, place, True)) != 0:
        problems.append("the same call does not finish")
    elif files_of(place / "out") != wanted or len(list(place.iterdir())) != 1:
        problems.append("it finishes with other files")
    return status, problems


def killed_saves(model: Path, place: Path, save: Save, every: int, moments: int) -> Iterator[tuple[Kill, list[str]]]:
    """(kill, what was wrong) at each `every`th change of the disk, and at random moments."""
    old = place.with_name("old") if save.replaces else None
    if old is not None:
        other = Save("another", _export if save.write is _quantized else _quantized, replaces=False)
        if ended(functools.partial(_work, other, model, place, True)) != 0:
            raise SystemExit(f"what a {save.name} was to replace could not be written")
        (place / "out").rename(old)
        shutil.copytree(old, place / "out")
    began = time.monotonic()
    if ended(functools.partial(_work, save, model, place, True)) != 0:
        raise SystemExit(f"an undisturbed {save.name} failed")
    seconds, wanted = time.monotonic() - began, files_of(place / "out")
    if old is not None and wanted.items() <= files_of(old).items():
        raise SystemExit(f"{save.name}: the old folder is the new one, and shows nothing")
    tried = functools.partial(_killed_and_done_again, save, model, place, old, wanted)
    yield from all_kills(tried, place, every, moments, seconds)
    shutil.rmtree(place)
    if old is not None:
        shutil.rmtree(old)
