"""SIGINT and SIGTERM: noted when they arrive, obeyed where no work is left half done. On Windows also SIGBREAK.

An exception raised in a signal handler appears between any two instructions, those of a clean-up included, and the code
that it reaches may swallow it (a finalizer, a library that catches everything). Handlers here therefore only note the
signal, and long work calls `check_signals` at places where it can stop. A command uses both: it exits at once outside
of such work (`exit_on_signals`), and at the next `check_signals` inside of it (`deferred_signals`). A chat takes
Ctrl-C for itself first (`interrupts_to`).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from qlora_lite.errors import Stopped

# SIGBREAK (Ctrl+Break) is how a process of Windows asks another one to stop; its SIGTERM comes from nobody else.
NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))


@dataclass
class _Pending:
    """The signal that arrived, if any, and the numbers of `deferred_signals` and `uninterrupted` blocks around."""

    number: int | None = None
    deferred: int = 0
    uninterrupted: int = 0

    def stop(self) -> None:
        """Raises Stopped if there was a signal, except within an `uninterrupted` block."""
        if self.number is not None and not self.uninterrupted:
            name = signal.Signals(self.number).name
            raise Stopped(self.number, f"stopped by {name}; nothing is left half-written")


_pending: _Pending | None = None
_to_remove: set[Path] = set()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def check_signals() -> None:
    """Raises Stopped if a signal was noted. Does nothing outside of the blocks below, or within `uninterrupted`."""
    if _pending is not None and _pending.number is not None and _in_main_thread():
        _pending.stop()


@contextmanager
def _noting(deferred: int, on_second_interrupt: Callable[[], None]) -> Iterator[_Pending]:
    """Notes SIGINT and SIGTERM within the block, and restores the previous handlers after it.

    on_second_interrupt: called when a SIGINT follows another signal.
    """
    global _pending
    pending = _Pending(deferred=deferred)

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and pending.number is not None:
            on_second_interrupt()
        pending.number = number
        if not pending.deferred:
            pending.stop()

    before = {number: signal.getsignal(number) for number in NUMBERS}
    replaced = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    _pending = pending
    try:
        for number in replaced:
            signal.signal(number, note)
        yield pending
    finally:
        _pending = None
        for number, handler in replaced.items():
            signal.signal(number, handler)


@contextmanager
def removed_at_end(path: Path) -> Iterator[None]:
    """Removes a file or folder at the end of the block if it still exists, also if the process exits at once."""
    _to_remove.add(path)
    try:
        yield
    finally:
        _remove(path)
        _to_remove.discard(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _quiet_finalizers() -> Iterator[None]:
    """Keeps Python from printing a traceback of `Stopped` raised in a finalizer, where exceptions are lost."""
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, Stopped):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def exit_on_signals(last_words: str) -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise Stopped at once within the block; in `deferred_signals` they wait for a check.

    Stopped comes out of the block even if code inside swallowed it or failed after it. A second SIGINT ends the process
    immediately, with `last_words` on stderr, after the paths of `removed_at_end` were removed: the first exception may
    have appeared in code that cannot pass it on, such as torch's own, or that waits. For the main thread of a command;
    ignored signals stay ignored.
    """

    def leave() -> None:
        for path in list(_to_remove):
            with suppress(OSError):  # other threads may be writing there
                _remove(path)
        os.write(2, f"{last_words}\n".encode(errors="backslashreplace"))  # sys.stderr may be in the middle of a line
        os._exit(128 + signal.SIGINT)

    with _noting(0, leave) as pending, _quiet_finalizers():
        try:
            yield
        except (Stopped, KeyboardInterrupt):
            raise
        except BaseException:
            pending.stop()
            raise
        pending.stop()


def _interrupt() -> None:
    raise KeyboardInterrupt


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Makes SIGINT and SIGTERM wait for `check_signals` within the block; a second SIGINT raises KeyboardInterrupt.

    The previous handlers are restored after the block and receive a signal that no check obeyed. Ignored signals stay
    ignored. Python runs handlers in the main thread only: in other threads the block changes nothing. Blocks may be
    nested.
    """
    if not _in_main_thread():
        yield
    elif _pending is None:
        unobeyed = None
        try:
            with _noting(1, _interrupt) as pending:
                try:
                    yield
                except (Stopped, KeyboardInterrupt):
                    pending.number = None
                    raise
                finally:
                    unobeyed = pending.number
        finally:
            if unobeyed is not None:
                signal.raise_signal(unobeyed)
    else:
        pending = _pending
        pending.deferred += 1
        try:
            yield
        finally:
            pending.deferred -= 1
        if not pending.deferred:
            check_signals()


@contextmanager
def obeyed_at_once() -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise Stopped at once within the block, also inside of `deferred_signals`.

    For work that waits long and leaves nothing half done, such as a download.
    """
    pending = _pending
    if pending is None or not _in_main_thread():
        yield
        return
    before, pending.deferred = pending.deferred, 0
    try:
        check_signals()
        yield
    finally:
        pending.deferred = before


@contextmanager
def interrupts_to(take: Callable[[], bool]) -> Iterator[None]:
    """Calls `take` for each SIGINT within the block, before what happens to it outside: only if `take` returns False.

    For commands that go on after Ctrl-C, such as a chat. `take` may raise where nothing can be left half done. An
    ignored signal stays ignored, and in other threads than the main one the block changes nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if not _in_main_thread() or before in (None, signal.SIG_IGN):
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        if take():
            return
        if callable(before):
            before(number, frame)
        else:  # SIG_DFL, which Python cannot call
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Makes `check_signals` do nothing within the block, so that a group of writes is completed."""
    pending = _pending
    if pending is None:
        yield
        return
    pending.uninterrupted += 1
    try:
        yield
    finally:
        pending.uninterrupted -= 1


def waiting_signal() -> int:
    """Returns the number of a signal that was noted and not obeyed yet; 0 if there is none."""
    return 0 if _pending is None or _pending.number is None else _pending.number


def signals_ignored_from_here() -> None:
    """Makes signals have no effect until the command or the outermost `deferred_signals` ends.

    For a process that is ending for another reason, and has to save and to say it.
    """
    if _pending is not None:
        _pending.uninterrupted += 1
