"""SIGINT and SIGTERM, noted when they come and obeyed where nothing is left half-done.

An exception out of a signal's handler comes between any two instructions, those of a clean-up included. So the handler
only notes the signal, and long work asks now and then, with `poll`, whether there was one.
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
    """The signal that came, if any, and how many blocks want not to be stopped in."""

    number: int | None = None
    kept_off: int = 0


_noted: _Noted | None = None


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def poll() -> None:
    """Raises Stopped if a signal was noted. Nothing outside of `stoppable` or inside of `unstopped`."""
    if _noted is not None and _noted.number is not None and not _noted.kept_off and _in_main_thread():
        name = signal.Signals(_noted.number).name
        raise Stopped(_noted.number, f"stopped by {name}; nothing is left half-written")


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM wait for a `poll`; a second SIGINT is a KeyboardInterrupt at once.

    The handlers that were there are put back, and get a signal that no poll obeyed. Ignored signals stay ignored.
    Handlers run in the main thread alone: in others the block changes nothing, nor does it within another such block.
    """
    global _noted
    if _noted is not None or not _in_main_thread():
        yield
        return
    noted = _Noted()

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and noted.number is not None:
            raise KeyboardInterrupt
        noted.number = number

    before = {number: signal.getsignal(number) for number in NUMBERS}
    ours = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    _noted = noted
    try:
        for number in ours:
            signal.signal(number, note)
        yield
    except (Stopped, KeyboardInterrupt):
        noted.number = None
        raise
    finally:
        _noted = None
        for number, handler in ours.items():
            signal.signal(number, handler)
        if noted.number is not None:
            signal.raise_signal(noted.number)


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
