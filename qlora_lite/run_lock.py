"""One run in a folder at a time: a file with a lock that the kernel lets go when its owner ends, however it does."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_lite.errors import CheckpointError

LOCK_FILE = ".run.lock"


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one of this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _held(path: Path) -> int:
    """A descriptor of the file, locked. CheckpointError, naming the process, if another holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise CheckpointError(
                f"{path.parent} is being written by another run (process {owner}); wait for it, or name another folder"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        if _is_at(path, descriptor):  # else its last owner has just removed it, and others make a new one
            return descriptor
        os.close(descriptor)


@contextmanager
def only_run(folder: Path) -> Iterator[Callable[[], None]]:
    """Holds the folder's lock, and gives a function that raises CheckpointError if the folder is not there any more."""
    path = folder / LOCK_FILE
    descriptor = _held(path)

    def check() -> None:
        if not _is_at(path, descriptor):
            raise CheckpointError(f"{folder} was removed, or replaced, while a run was writing there")

    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield check
    finally:
        if _is_at(path, descriptor):
            path.unlink()
        os.close(descriptor)
