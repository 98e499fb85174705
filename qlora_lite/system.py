"""What Linux has and other systems lack: functions of the C library, files of /proc, flags of open(2). And
what is asked of every system: its processor, the folder for caches, locks that end with the process that holds them.

The package works without each of them; docs/limits.md says what is lost. The system is asked for the thing itself, not
for its name, since a Linux can lack it too: another C library, an older kernel, a container.

filelock locks the descriptor of a file: flock(2) on Linux and macOS, LockFileEx on Windows. The file is opened, checked
and removed here. Of filelock's own classes, one leaves the file behind, another removes it while others open it, and
none says who holds it. A file is locked, never a folder: Windows cannot open a folder, and NFS shows the lock of a file
that is open for writing to other machines, but not that of a folder.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qlora_lite.errors import CheckpointError

# Writing to it resets the resident peak of this process (proc(5)).
CLEAR_REFS_FILE = "/proc/self/clear_refs"
# Opens a file for reads and writes that bypass the page cache (open(2)); 0 where there is no such flag.
O_DIRECT: int = getattr(os, "O_DIRECT", 0)
LOCK_FILE = ".run.lock"  # in the folder of a run
# The owner's process id, padded so that a later owner's covers it. The lock of Windows covers the first byte, which
# others cannot read.
RECORD_BYTES = 32
LOCKED_BYTES = 1


def c_function(name: str) -> Callable[..., int] | None:
    """Returns a function of the C library; None if it has none of this name, or if the system has no such library."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library without a name
        return None
    return function


def user_cache() -> Path:
    """Returns the folder for what can be made again: `$QLORA_LITE_CACHE`, or `~/.cache/qlora_lite`."""
    return Path(os.environ.get("QLORA_LITE_CACHE") or "~/.cache/qlora_lite").expanduser()


def processor() -> str:
    """Returns the name of the processor, with its family and model where Linux tells them: names alone are shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    numbers = [f"{name} {told[name]}" for name in ("cpu family", "model") if name in told]
    name = told.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join(numbers)})" if numbers else name


def opens_folders() -> bool:
    """Whether a folder can be opened, which flushing its names to the disk needs. Windows opens files only."""
    return hasattr(os, "O_DIRECTORY")


def missing() -> list[str]:
    """Returns what this system lacks of the things that the package has a use for, each in a few words."""
    present = {
        "peaks of resident memory (clear_refs)": os.access(CLEAR_REFS_FILE, os.W_OK),
        "limits of malloc (mallopt)": c_function("mallopt") is not None,
        "writes past the page cache (O_DIRECT)": O_DIRECT != 0,
        "exchange of two names (renameat2)": c_function("renameat2") is not None,
        "flushing of folders (O_DIRECTORY)": opens_folders(),
    }
    return [name for name, is_there in present.items() if not is_there]


def _is_open_as(path: Path, descriptor: int) -> bool:
    """Returns whether `descriptor` is the file that has this path now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> str:
    os.lseek(descriptor, LOCKED_BYTES, os.SEEK_SET)
    return os.read(descriptor, RECORD_BYTES).decode(errors="replace").strip() or "unknown"


def _lock(descriptor: int) -> bool:
    """Returns whether this process now holds the lock, which it does not if another one does."""
    from filelock import lock_descriptor  # here: commands that lock nothing start without it

    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        raise OSError(error.errno, f"its file system gives no lock ({error.strerror})") from error


def _opened_and_locked(path: Path) -> int:
    """Returns a descriptor of the file, which is made if it is missing, with a lock on it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            if not _lock(descriptor):
                raise BlockingIOError(errno.EAGAIN, f"process {_owner(descriptor)}", str(path))
            if _is_open_as(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last owner has just removed it, and others make a new one


def _remove(path: Path, descriptor: int) -> None:
    """Removes the file unless it was replaced, and ends the lock."""
    try:
        if _is_open_as(path, descriptor):
            path.unlink()  # before the lock ends: nobody can have locked it, to lose it by this
    except PermissionError:
        # Windows removes no open file, so here it is one that nobody else has opened either.
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()
    except BaseException:
        os.close(descriptor)
        raise
    else:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[Callable[[], bool]]:
    """Holds the lock of a file within the block. The file is made for it, and removed after it.

    A killed process leaves the file behind, without a lock. Yields a function that returns whether the file is still
    there: it is not if it, or a folder above it, was removed or replaced.
    Raises BlockingIOError, whose `strerror` names the owner as "process 123", if another process holds the lock, or
    this one does; another OSError if the file cannot be written, or its file system has no locks.
    """
    descriptor = _opened_and_locked(path)
    try:
        os.write(descriptor, b" " * LOCKED_BYTES + f"{os.getpid()}\n".encode().rjust(RECORD_BYTES))
        yield lambda: _is_open_as(path, descriptor)
    finally:
        _remove(path, descriptor)


@contextmanager
def locked_folder(folder: Path) -> Iterator[Callable[[], None]]:
    """Within the block this process holds the lock of a folder. Yields a check that the folder still exists.

    Raises CheckpointError if another process holds the lock; the check raises it if the folder was removed or replaced.
    """
    with ExitStack() as stack:
        try:
            is_there = stack.enter_context(locked(folder / LOCK_FILE))
        except BlockingIOError as error:
            raise CheckpointError(
                f"{folder} is being written by another run ({error.strerror}); wait for it, or name another folder"
            ) from None

        def check() -> None:
            if not is_there():
                raise CheckpointError(f"{folder} was removed, or replaced, while a run was writing there")

        yield check


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock of a file. The file is not made, and False if it cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError:
        return False
    try:
        return not _lock(descriptor)
    except OSError:  # its file system has no locks, so no run could write there
        return False
    finally:
        os.close(descriptor)
