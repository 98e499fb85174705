"""Kills exports, merges and packed checkpoints while they are written. Part of endure.py.

A save is killed at each write, sync, rename and removal, in the middle of writes, and at random times, with and without
an older folder to replace. Afterwards the folder must be the complete old one, the complete new one, or absent, and the
same call must finish with the files of an undisturbed call.
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

SHARD_BYTES = 40_000  # makes several files


@dataclass(frozen=True)
class Save:
    """One way of writing a folder. replaces: whether another folder is there before."""

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


def _work(save: Save, model: Path, scratch: Path, abandoned: bool) -> None:
    torch.set_num_threads(1)
    if abandoned:
        atomic_folder.ABANDONED_AFTER_SECONDS = -1  # so that the rest of a killed write is removed at once
    save.write(model, scratch / "out", save.replaces)


def _killed_and_done_again(
    save: Save, model: Path, scratch: Path, old: Path | None, wanted: dict[str, bytes], kill: Kill
) -> tuple[int, list[str]]:
    """Kills a save. Returns its exit status and the problems afterwards. old: the folder that it replaces."""
    shutil.rmtree(scratch)
    scratch.mkdir()
    if old is not None:
        shutil.copytree(old, scratch / "out")
    status = ended(functools.partial(_work, save, model, scratch, False), kill)
    found, problems = files_of(scratch / "out"), []
    if found not in ({} if old is None else files_of(old), wanted):
        problems.append("the folder is neither the old nor the new one")
    finishing = Save(save.name, save.write, replaces=bool(found))
    if ended(functools.partial(_work, finishing, model, scratch, True)) != 0:
        problems.append("the same call does not finish")
    elif files_of(scratch / "out") != wanted or len(list(scratch.iterdir())) != 1:
        problems.append("it finishes with other files")
    return status, problems


def killed_saves(model: Path, scratch: Path, save: Save, every: int, moments: int) -> Iterator[tuple[Kill, list[str]]]:
    """Yields (kill, problems) at each `every`th change on disk, and at random moments."""
    old = scratch.with_name("old") if save.replaces else None
    if old is not None:
        other = Save("another", _export if save.write is _quantized else _quantized, replaces=False)
        if ended(functools.partial(_work, other, model, scratch, True)) != 0:
            raise SystemExit(f"{save.name}: the folder to be replaced could not be written")
        (scratch / "out").rename(old)
        shutil.copytree(old, scratch / "out")
    began = time.monotonic()
    if ended(functools.partial(_work, save, model, scratch, True)) != 0:
        raise SystemExit(f"an undisturbed {save.name} failed")
    seconds, wanted = time.monotonic() - began, files_of(scratch / "out")
    if old is not None and wanted.items() <= files_of(old).items():
        raise SystemExit(f"{save.name}: the old folder equals the new one, so a kill would show nothing")
    tried = functools.partial(_killed_and_done_again, save, model, scratch, old, wanted)
    yield from all_kills(tried, scratch, every, moments, seconds)
    shutil.rmtree(scratch)
    if old is not None:
        shutil.rmtree(old)
