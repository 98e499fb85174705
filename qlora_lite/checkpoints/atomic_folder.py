"""Writes a folder as a whole: it gets its name once it is complete, and disappears if writing fails.

The last step of a weight on its way out: safetensors_write.py writes the files into such a folder. Adapters and runs
are written the same way.
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
from qlora_lite.signals import deferred_signals, removed_at_end

# The files of checkpoints, adapters and runs. A folder that holds other files is never replaced.
CHECKPOINT_SUFFIXES = (".safetensors", ".json", ".jsonl", ".jinja", ".model")
CHECKPOINT_NAMES = ("merges.txt", "vocab.txt", "README.md")
# An unfinished folder that nobody holds a lock on is abandoned, unless it is too young to have been locked.
ABANDONED_AFTER_SECONDS = 60
SPARE_BYTES = 64 << 20

# Arguments of renameat2(2), and the errors of a system or file system that cannot exchange names.
AT_FDCWD = -100
RENAME_EXCHANGE = 2
NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Raises CheckpointError if `target` must not be replaced by a new folder, or cannot be."""
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
    """Raises CheckpointError if the disk of `target` has fewer than `needed` + `SPARE_BYTES` bytes free."""
    place = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed + SPARE_BYTES:
        raise CheckpointError(
            f"{target} needs {needed + SPARE_BYTES:,} bytes and the disk of {place} has {free:,} free; make room, "
            f"or name a folder on another disk"
        )


def check_output_is_not_input(target: Path, *inputs: Path | None) -> None:
    """Raises CheckpointError if writing the folder `target` would replace an input, or a file that it links to."""
    target = Path(os.path.realpath(target))
    for path in inputs:
        if path is None:
            continue
        files = [part for part in path.iterdir() if not part.is_dir()] if path.is_dir() else []
        if any(Path(os.path.realpath(part)).is_relative_to(target) for part in (path, *files)):
            raise CheckpointError(f"the output {target} would replace the input {path}; name another folder")


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `target` at the end of the block, and removed if the block raises.

    Raises CheckpointError if `target` is a file, a mount point, a folder that is not empty (unless `overwrite`), or a
    folder with files that no checkpoint has.
    """
    target = Path(os.path.realpath(target))  # a link is followed, not replaced
    check_replaceable(target, overwrite)
    with deferred_signals(), _write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned_folders(target.parent, f".{glob.escape(target.name)}.*{UNFINISHED}")
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=UNFINISHED, dir=target.parent))
        with removed_at_end(temporary):
            # mkdtemp gives mode 0700. Here the mode follows the umask, and the setgid bit inherited from the parent is
            # kept, as for a folder made by mkdir.
            os.chmod(temporary, temporary.stat().st_mode & stat.S_ISGID | 0o777 & ~_umask())
            with locked(temporary):
                yield temporary
            sync(temporary)
            check_replaceable(target, overwrite)  # again, since another process may have written there meanwhile
            _rename_over(temporary, target)


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error


def _rename_over(temporary: Path, target: Path) -> None:
    """Renames a finished folder to `target` and removes the folder that had this name.

    The two names are exchanged if the file system can do it, so that `target` exists at every instant.
    """
    if not target.exists():
        os.rename(temporary, target)
    elif not exchange_names(temporary, target):
        old = temporary.with_suffix(".old")  # not UNFINISHED: for an instant it is the only copy
        os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old)
    sync(target.parent)


def remove_abandoned_folders(folder: Path, pattern: str) -> None:
    """Removes the unfinished folders of killed processes: those matching `pattern` that nobody holds a lock on."""
    for abandoned in folder.glob(pattern):
        if time.time() - abandoned.stat().st_mtime > ABANDONED_AFTER_SECONDS:
            with suppress(BlockingIOError), locked(abandoned):
                shutil.rmtree(abandoned, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on a folder. It ends with the block, or with the process if that is killed.

    Raises BlockingIOError if another process holds the lock.
    """
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
    """Exchanges two existing names in one step, so that neither is missing at any instant.

    Returns False if the system or the file system cannot do it. Raises OSError for any other failure.
    """
    move = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux, glibc 2.28 or musl 1.2.5
    if move is None:
        return False
    if move(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
