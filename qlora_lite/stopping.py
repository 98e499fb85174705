"""SIGINT and SIGTERM, noted when they come and obeyed where nothing is left half-done.

An exception out of a signal's handler comes between any two instructions, those of a clean-up included, and what it
meets may swallow it: a finalizer, a library that catches all. So the handler only notes the signal, and long work asks
now and then, with `poll`, whether there was one. A command does both: it ends at once where nobody would ask
(`ended_by_signals`), and waits to be asked in long work of ours (`stoppable`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qlora_lite.errors import Stopped

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class _Noted:
    """The signal that came, if any; how many blocks want to be asked, and how many not to be stopped in."""

    number: int | None = None
    again: bool = False  # a SIGINT came after it
    waiting: int = 0
    kept_off: int = 0

    def stop(self) -> None:
        """Raises Stopped if there was a signal and none of these blocks is in the way."""
        if self.number is not None and not self.kept_off:
            name = signal.Signals(self.number).name
            raise Stopped(self.number, f"stopped by {name}; nothing is left half-written")

    def end(self) -> None:
        """Raises what a signal should have ended by, if there was one."""
        if self.again:
            raise KeyboardInterrupt
        self.stop()


_noted: _Noted | None = None


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def poll() -> None:
    """Raises Stopped if a signal was noted. Nothing outside of the blocks below, or inside of `unstopped`."""
    if _noted is not None and _noted.number is not None and _in_main_thread():
        _noted.stop()


@contextmanager
def _noting(waiting: int) -> Iterator[_Noted]:
    """Has SIGINT and SIGTERM noted within the block; the handlers that were there are put back."""
    global _noted
    noted = _Noted(waiting=waiting)

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and noted.number is not None:
            noted.again = True
            raise KeyboardInterrupt
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
def ended_by_signals() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM raise Stopped at once, except in `stoppable`, where they wait for a poll.

    Stopped comes out of the block, whatever swallowed it inside or went wrong after it; a second SIGINT is a
    KeyboardInterrupt at once, which comes out instead. For a command, in the main thread; ignored signals stay ignored.
    """
    with _noting(0) as noted:
        try:
            yield
        except (Stopped, KeyboardInterrupt):
            raise
        except BaseException:
            noted.end()
            raise
        noted.end()


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
            with _noting(1) as noted:
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
