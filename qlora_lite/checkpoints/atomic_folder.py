"""Writes a folder as a whole: it gets its name once it is complete, and disappears if writing fails.

The last step of a weight on its way out: safetensors_write.py writes the files into such a folder. Adapters and runs
are written the same way.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_lite.checkpoints.files import UNFINISHED, is_companion_name, rename, sync
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.signals import deferred_signals, removed_at_end
from qlora_lite.system import c_function, locked

# The files of checkpoints, adapters and runs, besides companion files. A folder with other files is never replaced.
CHECKPOINT_SUFFIXES = (".safetensors", ".gguf", ".jsonl")
CHECKPOINT_NAMES = ("README.md", "Modelfile")
# An unfinished folder that nobody holds a lock on is abandoned, unless it is too young to have been locked.
ABANDONED_AFTER_SECONDS = 60
SPARE_BYTES = 64 << 20
# What an unfinished folder holds: its lock, and beside it the folder that is renamed, which has no file of ours then.
LOCK_FILE = ".lock"
CONTENT = "new"

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
    return path.suffix in CHECKPOINT_SUFFIXES or path.name in CHECKPOINT_NAMES or is_companion_name(path.name)


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
        # Not tempfile's, whose mode is 0700 on POSIX and whose access list is the owner's on Windows: the folder gets
        # what mkdir gives it there.
        unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}{UNFINISHED}")
        unfinished.mkdir()
        with removed_at_end(unfinished), locked(unfinished / LOCK_FILE):
            temporary = unfinished / CONTENT
            temporary.mkdir()
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

    The two names are exchanged if the system can do it, so that `target` exists at every instant.
    """
    if not target.exists():
        rename(temporary, target)
    elif not exchange_names(temporary, target):
        old = temporary.parent.with_suffix(".old")  # not UNFINISHED: for an instant it is the only copy
        rename(target, old)
        try:
            rename(temporary, target)
        except OSError:
            rename(old, target)
            raise
        shutil.rmtree(old)
    sync(target.parent)


def remove_abandoned_folders(folder: Path, pattern: str) -> None:
    """Removes the unfinished folders of killed processes: those matching `pattern` that nobody holds a lock on."""
    for abandoned in folder.glob(pattern):
        # Others may hold it, own it, or have removed it just now.
        with suppress(BlockingIOError, PermissionError, FileNotFoundError):
            if abandoned.is_dir() and time.time() - abandoned.stat().st_mtime > ABANDONED_AFTER_SECONDS:
                with locked(abandoned / LOCK_FILE):
                    shutil.rmtree(abandoned / CONTENT, ignore_errors=True)
                shutil.rmtree(abandoned, ignore_errors=True)  # without an open file, which NFS and Windows would keep


def exchange_names(one: Path, other: Path) -> bool:
    """Exchanges two existing names in one step, so that neither is missing at any instant.

    Returns False if the system or the file system cannot do it. Raises OSError for any other failure.
    """
    move = c_function("renameat2")  # Linux, glibc 2.28 or musl 1.2.5
    if move is None:
        return False
    if move(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
