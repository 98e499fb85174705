"""Folders of safetensors files: writing that never leaves half a folder. (Reading: tensor_files.py.)

Files are written here, not by the safetensors package, because that one needs every tensor of a file in memory at
once. The format is a length (8 bytes, little endian), a JSON header of that length with the dtype, shape and byte
range of each tensor, and the bytes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_lite.checkpoints.files import UNFINISHED, sync
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.signals import stoppable, unfinished

# What a folder may hold that is replaced as a whole: the files that checkpoints, adapters and runs consist of.
CHECKPOINT_SUFFIXES = (".safetensors", ".json", ".jsonl", ".jinja", ".model")
# A folder whose maker holds no lock on it is abandoned; one so young may not have its lock yet.
ABANDONED_AFTER_SECONDS = 60
SPARE_BYTES = 64 << 20
CHECKPOINT_NAMES = ("merges.txt", "vocab.txt", "README.md")

AT_FDCWD = -100
RENAME_EXCHANGE = 2
# What says that the system, or the file system, cannot do it: that is no failure of this move.
UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Raises CheckpointError for a folder that must not, or cannot, be replaced as a whole."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a folder")
    if not target.is_dir():
        return
    if os.path.ismount(target):
        raise CheckpointError(f"{target} is a mount point and cannot be replaced in one move; name a folder inside it")
    if not overwrite and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty; name another folder, or ask for overwrite")
    files = sorted(path for path in target.rglob("*") if not path.is_dir())
    foreign = [str(path.relative_to(target)) for path in files if not _is_replaceable(path)]
    if foreign:
        shown = listing(foreign, 4)
        raise CheckpointError(
            f"{target} holds files that no checkpoint has, and they would be lost: {shown}; move them"
        )


def _is_replaceable(path: Path) -> bool:
    return path.suffix in CHECKPOINT_SUFFIXES or path.name in CHECKPOINT_NAMES


def check_free_space(target: Path, needed: int) -> None:
    """Raises CheckpointError unless the disk that is to hold `target` has so many bytes free, and some to spare."""
    place = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed + SPARE_BYTES:
        raise CheckpointError(
            f"{target} needs {needed + SPARE_BYTES:,} bytes and the disk of {place} has {free:,} free; make room, "
            f"or name a folder on another disk"
        )


def check_output_is_not_input(target: Path, *inputs: Path | None) -> None:
    """Raises CheckpointError if writing the folder `target` would replace one of the inputs, or what it links to."""
    target = Path(os.path.realpath(target))
    for path in inputs:
        if path is None:
            continue
        files = [part for part in path.iterdir() if not part.is_dir()] if path.is_dir() else []
        if any(Path(os.path.realpath(part)).is_relative_to(target) for part in (path, *files)):
            raise CheckpointError(f"the output {target} would replace the input {path}; name another folder")


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes it when the block ends well, and disappears when it does not.

    Raises CheckpointError if `target` is a file, a mount point, a folder with something in it and `overwrite` is not
    set, or one with files that are no checkpoint's.
    """
    target = Path(os.path.realpath(target))  # behind a link stands the folder that is meant
    check_replaceable(target, overwrite)
    with stoppable(), _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned_folders(target.parent, f".{glob.escape(target.name)}.*{UNFINISHED}")
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=UNFINISHED, dir=target.parent))
        with unfinished(temporary):
            # mkdtemp gives 0700; a folder made in the usual way follows the umask, and keeps the group of its parent's
            # files where the parent says so (setgid, which is inherited).
            os.chmod(temporary, temporary.stat().st_mode & stat.S_ISGID | 0o777 & ~_umask())
            with locked(temporary):
                yield temporary
            sync(temporary)
            check_replaceable(target, overwrite)  # again: others may have written there meanwhile
            _put(temporary, target)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error


def _put(temporary: Path, target: Path) -> None:
    """Gives a finished folder its name; what had it before goes, after that where the file system can exchange two."""
    if not target.exists():
        os.rename(temporary, target)
    elif not exchange_names(temporary, target):
        old = temporary.with_suffix(".old")  # no name of unfinished work: for an instant it is the only one there is
        os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old)
    sync(target.parent)


def remove_abandoned_folders(folder: Path, pattern: str) -> None:
    """Removes unfinished folders that killed processes left behind: those that nobody holds a lock on any more."""
    for left in folder.glob(pattern):
        if time.time() - left.stat().st_mtime > ABANDONED_AFTER_SECONDS:
            with suppress(BlockingIOError), locked(left):
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which goes with the process however it ends. BlockingIOError if another holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def exchange_names(one: Path, other: Path) -> bool:
    """Has two existing names trade places, so that at no instant either is missing. False where that cannot be done.

    OSError for whatever else goes wrong.
    """
    move = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux, glibc 2.28 or musl 1.2.5
    if move is None:
        return False
    if move(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
