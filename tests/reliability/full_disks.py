"""Disks that are really full, and disks that are read-only: small ones, mounted for this. Run by endure.py.

With so much room left on the disk, and so much more, until it is enough, an export, a packed checkpoint, a run with
checkpoints and lines of metrics are written: each either ends with one sentence, and what was there is there whole, or
it is done. After room was made the same call finishes, with the files of a call that was not disturbed. In memory
(tmpfs), and, for root, in a file system on a loop device (ext4), where bytes go past the page cache.

The mounts are those of a process alone and go with it: in a namespace of its own (unshare(2)), for root, and for others
where the system lets them have one.
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
from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.checkpoints import atomic_folder
from qlora_lite.errors import CheckpointError
from qlora_lite.training.run_folder import run_folder

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
DISK_BYTES = 8 << 20
BLOCK = 4096
BALLAST = "ballast"
FULL, READ_ONLY = "No space left on device", "Read-only file system"


@dataclass(frozen=True)
class Work:
    """What is written into `out` of a disk. files: what of it is the same each time; wrong: what a failure spoilt."""

    name: str
    write: Callable[[Path, bool], object]
    files: Callable[[Path], dict[str, bytes]]
    wrong: Callable[[Path, dict[str, bytes]], list[str]]
    replaces: bool = False


def _own_mounts() -> None:
    """Gives this process, which has one thread, mounts of its own. OSError where the system does not."""
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
def _disk(kind: str, place: Path) -> Iterator[Path]:
    """A new disk of this kind, mounted at a folder."""
    place.mkdir()
    if kind == "ext4":
        image = place.with_suffix(".image")
        image.write_bytes(b"")
        os.truncate(image, DISK_BYTES)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        _mount("-o", "loop", str(image), str(place))
        shutil.rmtree(place / "lost+found")
    else:
        _mount("-t", kind, "-o", f"size={DISK_BYTES}", "none", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _fill(disk: Path, room: int) -> None:
    """Leaves so many bytes."""
    with open(disk / BALLAST, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(BLOCK))
        except OSError:
            size = os.fstat(file.fileno()).st_size
        file.truncate(max(0, size - room))


def _spoilt_folder(folder: Path, old: dict[str, bytes]) -> list[str]:
    found = [] if files_of(folder) == old else ["half of it stands under the name"]
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
class _Line:
    """A step of which only the metrics are written."""

    step: int
    words: str = "more than a few bytes " * 9


def _write_lines(folder: Path, again: bool) -> None:
    """Lines of several blocks, so that a disk is full within one."""
    torch.manual_seed(0)
    model = adaptable()
    add_lora_(model, LoraConfig(rank=2, target_modules=["first"]))
    with run_folder(model, folder, overwrite=again) as writer:
        for number in range(60):
            writer.note(_Line(number))


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
    """Whether the work was done; what was wrong with how it was not."""
    before = work.files(disk / "out")
    try:
        work.write(disk / "out", False)
    except CheckpointError as error:
        problems = work.wrong(disk / "out", before)
        if because not in str(error) or len(str(error).splitlines()) != 1:
            problems.append(f"it said {error}")
        return False, problems
    return True, []


def _tries(work: Work, disk: Path, old: Path | None, every: int) -> Iterator[tuple[str, list[str]]]:
    """(what was tried, what was wrong), with more and more room, and without any right to write."""
    for _ in range(2):  # what the first one of a process imports draws random numbers
        _begin(disk, old)
        work.write(disk / "out", False)
    wanted, room, done = work.files(disk / "out"), 0, False

    def finished() -> list[str]:
        work.write(disk / "out", True)
        found = work.files(disk / "out")
        return [f"it finishes with another {name}" for name in wanted | found if wanted.get(name) != found.get(name)]

    _begin(disk, old)
    _mount("-o", "remount,ro", str(disk))
    done, problems = _refused(work, disk, READ_ONLY)
    _mount("-o", "remount,rw", str(disk))
    yield "read-only", [*problems, *["it wrote"] * done, *finished()]
    while not done:
        _begin(disk, old)
        _fill(disk, room)
        done, problems = _refused(work, disk, FULL)
        (disk / BALLAST).unlink()
        yield f"{room} bytes left", problems + finished()
        room += every * BLOCK


def _old(place: Path, model: Path, work: Work) -> Path | None:
    """What stands there before: the other kind of folder."""
    if not work.replaces:
        return None
    other = next(save for save in SAVES if not save.replaces and not work.name.startswith(save.name))
    folder = place / f"before {work.name}"
    other.write(model, folder, True)
    return folder


def _all(model: Path, place: Path, tiny: bool) -> None:
    atomic_folder.SPARE_BYTES = -(1 << 40)  # else an export is refused before it writes anything
    kinds = ["tmpfs", "ext4"] if os.geteuid() == 0 and not tiny else ["tmpfs"]
    tried, wrong = 0, []
    try:
        _own_mounts()
        for kind in kinds:
            with _disk(kind, place / kind) as disk:
                works = [work for work in _works(model) if not tiny or work.name in ("export over another", "metrics")]
                for work in works:
                    for what, problems in _tries(work, disk, _old(place, model, work), 16 if tiny else 1):
                        tried += 1
                        wrong += [f"{work.name} on {kind}, {what}: {problem}" for problem in problems]
        found = {"tried": tried, "wrong": wrong}
    except PermissionError as error:
        found = {"not_permitted": str(error)}
    (place / "found.json").write_text(json.dumps(found))


def full_disks(model: Path, place: Path, tiny: bool) -> tuple[int | None, list[str]]:
    """How often something was written onto a full or read-only disk, and what was wrong; None if none can be made."""
    place.mkdir()
    if (status := ended(functools.partial(_all, model, place, tiny))) != 0:
        return 0, [f"the process with the disks ended with {status}"]
    found = json.loads((place / "found.json").read_text())
    if "not_permitted" in found:
        return None, [f"full disks were not tried, since mounting is not permitted here: {found['not_permitted']}"]
    return found["tried"], found["wrong"]
