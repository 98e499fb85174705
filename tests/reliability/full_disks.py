"""Writes to disks that are full or read-only: small disks, mounted for this. Part of endure.py.

An export, a packed checkpoint, a run with checkpoints and lines of metrics are each written with a number of free bytes
that grows until the write succeeds. A failed write must raise one sentence and leave all older files whole. After room
is made, the same call must finish, with the files of an undisturbed call. The disks are tmpfs, and for root also ext4
on a loop device, where bytes pass the page cache.

The mounts belong to one process and end with it. It has a mount namespace of its own (unshare(2)): root always, other
users where the system permits it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bad_inputs import adaptable
from kill_points import ended
from killed_runs import final_files, run, wrong_after_kill
from killed_saves import SAVES, Save, files_of
from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized
from qlora_lite.checkpoints import atomic_folder
from qlora_lite.data.stream import BatchStream
from qlora_lite.errors import CheckpointError
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.training.metrics import StepMetrics
from qlora_lite.training.optim import make_optimizer
from qlora_lite.training.run_folder import run_folder
from qlora_lite.training.run_state import Run

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
DISK_BYTES = 8 << 20
BLOCK = 4096
BALLAST = "ballast"
FULL, READ_ONLY = "No space left on device", "Read-only file system"


@dataclass(frozen=True)
class Work:
    """One kind of output, written to the folder `out` of a disk.

    files: returns the contents that are equal in every run. wrong: describes damage after a failed write.
    replaces: whether an older folder is there before.
    """

    name: str
    write: Callable[[Path, bool], object]
    files: Callable[[Path], dict[str, bytes]]
    wrong: Callable[[Path, dict[str, bytes]], list[str]]
    replaces: bool = False


def _own_mounts() -> None:
    """Moves this single-threaded process into a mount namespace of its own. Raises OSError where that is forbidden."""
    user, group, root = os.geteuid(), os.getegid(), os.geteuid() == 0
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | (0 if root else CLONE_NEWUSER)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if not root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("--make-rprivate", "/")


def _mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(done.stderr.strip())


@contextmanager
def _disk(kind: str, mount_point: Path) -> Iterator[Path]:
    """Mounts a new disk of this kind at `mount_point`, and unmounts it afterwards."""
    mount_point.mkdir()
    if kind == "ext4":
        image = mount_point.with_suffix(".image")
        image.write_bytes(b"")
        os.truncate(image, DISK_BYTES)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        _mount("-o", "loop", str(image), str(mount_point))
        shutil.rmtree(mount_point / "lost+found")
    else:
        _mount("-t", kind, "-o", f"size={DISK_BYTES}", "none", str(mount_point))
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


def _fill(disk: Path, room: int) -> None:
    """Fills the disk up to `room` free bytes."""
    with open(disk / BALLAST, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(BLOCK))
        except OSError:
            size = os.fstat(file.fileno()).st_size
        file.truncate(max(0, size - room))


def _spoilt_folder(folder: Path, old: dict[str, bytes]) -> list[str]:
    found = [] if files_of(folder) == old else ["the folder is neither the old nor the new one"]
    return found + [f"{path.name} was left" for path in folder.parent.iterdir() if path.name not in ("out", BALLAST)]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _spoilt_lines(folder: Path, old: dict[str, bytes]) -> list[str]:
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [f"{metrics.name} has {line[:40]!r}" for line in lines if not _is_json(line)]


def _spoilt_run(model: Path, folder: Path, old: dict[str, bytes]) -> list[str]:
    found = wrong_after_kill(load_quantized(model, QuantConfig()), folder) + _spoilt_lines(folder, old)
    return found + [f"{path} was left" for path in folder.rglob("*.partial")]


@dataclass(frozen=True)
class _Line(StepMetrics):
    """The metrics of one step, in a longer line."""

    words: str = "more than a few bytes " * 9


def _write_lines(folder: Path, again: bool) -> None:
    """Writes metrics of several disk blocks, so that the disk becomes full within a line."""
    torch.manual_seed(0)
    model = adaptable()
    add_lora_(model, LoraConfig(rank=2, target_modules=["first"]))
    trained, config = adapter_parameters(model), TrainConfig()
    run = Run(model, trained, make_optimizer(trained, config), config, BatchStream([], None, None))
    with run_folder(run, folder, overwrite=again) as writer:
        for number in range(60):
            writer.finish_step(_Line(number, 1.0, 1.0, 1e-4, 8, 1.0, None))


def _lines(folder: Path) -> dict[str, bytes]:
    metrics = folder / "metrics.jsonl"
    return {metrics.name: metrics.read_bytes()} if metrics.exists() else {}


def _works(model: Path) -> Iterator[Work]:
    for save in SAVES:
        write = functools.partial(_write, save, model)
        yield Work(save.name, write, files_of, _spoilt_folder, save.replaces)
    yield Work(
        "run",
        lambda folder, again: run(model, folder, again),
        lambda folder: final_files(folder) if folder.exists() else {},
        functools.partial(_spoilt_run, model),
    )
    yield Work("metrics", _write_lines, lambda folder: files_of(folder / "adapter") | _lines(folder), _spoilt_lines)


def _write(save: Save, model: Path, folder: Path, again: bool) -> None:
    save.write(model, folder, save.replaces or again)


def _begin(disk: Path, old: Path | None) -> None:
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if old is not None:
        shutil.copytree(old, disk / "out")


def _refused(work: Work, disk: Path, because: str) -> tuple[bool, list[str]]:
    """Returns whether the work finished, and the problems of its refusal."""
    before = work.files(disk / "out")
    try:
        work.write(disk / "out", False)
    except CheckpointError as error:
        problems = work.wrong(disk / "out", before)
        if because not in str(error) or len(str(error).splitlines()) != 1:
            problems.append(f"the error is {error}")
        return False, problems
    return True, []


def _tries(work: Work, disk: Path, old: Path | None, every: int) -> Iterator[tuple[str, list[str]]]:
    """Yields (attempt, problems): on a read-only disk, then with more and more free bytes until the work is done."""
    for _ in range(2):  # imports in the first write of a process draw random numbers
        _begin(disk, old)
        work.write(disk / "out", False)
    wanted, room, done = work.files(disk / "out"), 0, False

    def finished() -> list[str]:
        work.write(disk / "out", True)
        found = work.files(disk / "out")
        return [f"after a retry, {name} differs" for name in wanted | found if wanted.get(name) != found.get(name)]

    _begin(disk, old)
    _mount("-o", "remount,ro", str(disk))
    done, problems = _refused(work, disk, READ_ONLY)
    _mount("-o", "remount,rw", str(disk))
    yield "read-only", [*problems, *["it was written to"] * done, *finished()]
    while not done:
        _begin(disk, old)
        _fill(disk, room)
        done, problems = _refused(work, disk, FULL)
        (disk / BALLAST).unlink()
        yield f"{room} bytes left", problems + finished()
        room += every * BLOCK


def _old(scratch: Path, model: Path, work: Work) -> Path | None:
    """Writes the folder that the work replaces, which is of another kind; None if it replaces nothing."""
    if not work.replaces:
        return None
    other = next(save for save in SAVES if not save.replaces and not work.name.startswith(save.name))
    folder = scratch / f"before {work.name}"
    other.write(model, folder, True)
    return folder


def _all(model: Path, scratch: Path, tiny: bool) -> None:
    atomic_folder.SPARE_BYTES = -(1 << 40)  # otherwise an export is refused before it writes anything
    kinds = ["tmpfs", "ext4"] if os.geteuid() == 0 and not tiny else ["tmpfs"]
    tried, wrong = 0, []
    try:
        _own_mounts()
        for kind in kinds:
            with _disk(kind, scratch / kind) as disk:
                works = [work for work in _works(model) if not tiny or work.name in ("export over another", "metrics")]
                for work in works:
                    for what, problems in _tries(work, disk, _old(scratch, model, work), 16 if tiny else 1):
                        tried += 1
                        wrong += [f"{work.name} on {kind}, {what}: {problem}" for problem in problems]
        found = {"tried": tried, "wrong": wrong}
    except PermissionError as error:
        found = {"not_permitted": str(error)}
    (scratch / "found.json").write_text(json.dumps(found))


def full_disks(model: Path, scratch: Path, tiny: bool) -> tuple[int | None, list[str]]:
    """Returns the number of writes to full or read-only disks (None where mounting is forbidden), and the problems."""
    scratch.mkdir()
    if (status := ended(functools.partial(_all, model, scratch, tiny))) != 0:
        return 0, [f"the process with the disks ended with {status}"]
    found = json.loads((scratch / "found.json").read_text())
    if "not_permitted" in found:
        return None, [f"full disks were not tried, because mounting is not permitted: {found['not_permitted']}"]
    return found["tried"], found["wrong"]
