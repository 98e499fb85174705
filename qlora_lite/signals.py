"""SIGINT and SIGTERM, noted when they come and obeyed where nothing is left half-done.

An exception out of a signal's handler comes between any two instructions, those of a clean-up included, and what it
meets may swallow it: a finalizer, a library that catches all. So the handler only notes the signal, and long work asks
now and then, with `poll`, whether there was one. A command does both: it ends at once where nobody would ask
(`ended_by_signals`), and waits to be asked in long work of ours (`stoppable`).
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
from typing import Any

from qlora_lite.errors import Stopped

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class _Noted:
    """The signal that came, if any; how many blocks want to be asked, and how many not to be stopped in."""

    number: int | None = None
    waiting: int = 0
    kept_off: int = 0

    def stop(self) -> None:
        """Raises Stopped if there was a signal and none of these blocks is in the way."""
        if self.number is not None and not self.kept_off:
            name = signal.Signals(self.number).name
            raise Stopped(self.number, f"stopped by {name}; nothing is left half-written")


_noted: _Noted | None = None
_unfinished: set[Path] = set()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def poll() -> None:
    """Raises Stopped if a signal was noted. Nothing outside of the blocks below, or inside of `unstopped`."""
    if _noted is not None and _noted.number is not None and _in_main_thread():
        _noted.stop()


@contextmanager
def _noting(waiting: int, leave: Callable[[], None]) -> Iterator[_Noted]:
    """Has SIGINT and SIGTERM noted within the block; the handlers that were there are put back.

    leave: called when a SIGINT follows on another signal.
    """
    global _noted
    noted = _Noted(waiting=waiting)

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and noted.number is not None:
            leave()
        noted.number = number
        if not noted.waiting:
            noted.stop()

    before = {number: signal.getsignal(number) for number in NUMBERS}
    ours = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    _noted = noted
    try:
        for number in ours:
            signal.signal(number, note)
        yield noted
    finally:
        _noted = None
        for number, handler in ours.items():
            signal.signal(number, handler)


@contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Removes a file or folder at the end of the block, if it is still there; also if a command is left at once."""
    _unfinished.add(path)
    try:
        yield
    finally:
        _remove(path)
        _unfinished.discard(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _quiet_finalizers() -> Iterator[None]:
    """Within the block Python prints no traceback of what a signal raised in a finalizer, where it ends."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, Stopped):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def ended_by_signals(last_words: str) -> Iterator[None]:
    """Within the block SIGINT and SIGTERM raise Stopped at once, except in `stoppable`, where they wait for a poll.

    Stopped comes out of the block, whatever swallowed it inside or went wrong after it. A second SIGINT ends the
    process then and there, with `last_words` on stderr, once what is `unfinished` was removed: an exception may come in
    the midst of torch's own code, which cannot hand it on, and what catches or waits may keep it. For a command, in the
    main thread; ignored signals stay ignored.
    """

    def leave() -> None:
        for path in list(_unfinished):
            with suppress(OSError):  # others may be writing there
                _remove(path)
        os.write(2, f"{last_words}\n".encode(errors="backslashreplace"))  # sys.stderr may be in the midst of a line
        os._exit(128 + signal.SIGINT)

    with _noting(0, leave) as noted, _quiet_finalizers():
        try:
            yield
        except (Stopped, KeyboardInterrupt):
            raise
        except BaseException:
            noted.stop()
            raise
        noted.stop()


def _interrupt() -> None:
    raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM wait for a `poll`; a second SIGINT is a KeyboardInterrupt at once.

    The handlers that were there are put back, and get a signal that no poll obeyed. Ignored signals stay ignored.
    Handlers run in the main thread alone: in others the block changes nothing, nor does it within another such block.
    """
    if not _in_main_thread():
        yield
    elif _noted is None:
        unobeyed = None
        try:
            with _noting(1, _interrupt) as noted:
                try:
                    yield
                except (Stopped, KeyboardInterrupt):
                    noted.number = None
                    raise
                finally:
                    unobeyed = noted.number
        finally:
            if unobeyed is not None:
                signal.raise_signal(unobeyed)
    else:
        noted = _noted
        noted.waiting += 1
        try:
            yield
        finally:
            noted.waiting -= 1
        if not noted.waiting:
            poll()


@contextmanager
def unstopped() -> Iterator[None]:
    """Within the block no poll stops anything: what is written there is written to its end."""
    noted = _noted
    if noted is None:
        yield
        return
    noted.kept_off += 1
    try:
        yield
    finally:
        noted.kept_off -= 1
