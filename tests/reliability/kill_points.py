"""Kills a process at a chosen change on disk: before a write, sync, rename or removal, or in the middle of a write.

Also kills at a chosen time. Part of killed_runs.py and killed_saves.py; tests call `arm` at the start of a program.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite.checkpoints import atomic_folder

# The functions of `os` that change a disk; shutil, tempfile and pathlib call them too.
CHANGES = ("write", "fsync", "ftruncate", "rename", "replace", "mkdir", "unlink", "remove", "rmdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _path_of(target: Any, within: int | None) -> str:
    """Returns the path of a file descriptor, or of a name, which is relative to the open folder `within` if given."""
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    folder = os.getcwd() if within is None else os.readlink(f"/proc/self/fd/{within}")
    return os.path.join(folder, os.fsdecode(target))


class _Countdown:
    """Counts the changes below a folder, and kills the process before change number `point`, counted from 0."""

    def __init__(self, point: int, below: Path) -> None:
        self._left, self._below, self._lock = point, os.path.realpath(below), threading.Lock()

    def tick(self, target: Any, within: int | None = None) -> None:
        if not _path_of(target, within).startswith(self._below):
            return
        with self._lock:
            self._left -= 1
            if self._left < 0:
                os.kill(os.getpid(), signal.SIGKILL)


def arm(point: int, below: Path) -> None:
    """Makes this process kill itself at change number `point` of the folder `below` or of anything in it."""
    countdown = _Countdown(point, below)

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(change)
        def with_count(*given: Any, **named: Any) -> Any:
            countdown.tick(given[0], named.get("dir_fd"))
            return change(*given, **named)

        return with_count

    def torn(write: Callable[..., int]) -> Callable[..., int]:
        def in_halves(descriptor: int, data: Any) -> int:
            countdown.tick(descriptor)
            first = write(descriptor, memoryview(data)[: len(data) // 2])
            countdown.tick(descriptor)
            return first + write(descriptor, memoryview(data)[first:])

        return in_halves

    def opened(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(given[0], (str, bytes)) and given[2] & WRITING:
            countdown.tick(given[0])

    for name in CHANGES:
        change = getattr(os, name)
        setattr(os, name, torn(change) if name == "write" else counted(change))
    atomic_folder.exchange_names = counted(atomic_folder.exchange_names)
    sys.addaudithook(opened)


@dataclass(frozen=True)
class Kill:
    """A kill at change number `point` of the folder `below`, or, where that is None, `after` so many seconds."""

    below: Path
    point: int | None = None
    after: float = 0.0

    def __str__(self) -> str:
        return f"after {self.after:.3f} s" if self.point is None else f"at change {self.point}"


def ended(work: Callable[[], None], kill: Kill | None = None) -> int:
    """Runs `work` in a forked process. Returns its exit status, or the negative number of the signal that killed it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if kill is not None and kill.point is not None:
                arm(kill.point, kill.below)
            work()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    if kill is not None and kill.point is None:
        time.sleep(kill.after)
        os.kill(child, signal.SIGKILL)  # an ended process keeps its number until it is waited for
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def all_kills(
    tried: Callable[[Kill], tuple[int, list[str]]], below: Path, every: int, moments: int, seconds: float
) -> Iterator[tuple[Kill, list[str]]]:
    """Yields (kill, problems) at each `every`th change on disk, then at random moments within so many seconds.

    tried: runs a process with this kill, and returns its exit status and the problems afterwards. Processes that ended
    before their kill are not counted.
    """
    for point in itertools.count(0, every):
        kill = Kill(below, point)
        status, problems = _tried(tried, kill)
        if status != 0 or problems:
            yield kill, problems
        if status != -signal.SIGKILL:
            break
    if point == 0:
        raise SystemExit(f"nothing was killed, because nothing changed below {below}")
    drawn = random.Random(0)
    for _ in range(moments):
        kill = Kill(below, after=drawn.uniform(0, seconds))
        status, problems = _tried(tried, kill)
        if status != 0 or problems:
            yield kill, problems


def _tried(tried: Callable[[Kill], tuple[int, list[str]]], kill: Kill) -> tuple[int, list[str]]:
    """Calls `tried`, and counts an end that is neither a kill nor a success as a problem."""
    status, problems = tried(kill)
    return status, problems if status in (0, -signal.SIGKILL) else [f"it ended with {status}", *problems]
