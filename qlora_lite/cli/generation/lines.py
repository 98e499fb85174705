"""What a chat reads, from a person or a pipe, and what it shows."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qlora_lite.errors import Stopped
from qlora_lite.signals import deferred_signals, interrupts_to

PROMPT = "> "
MOST_INTERRUPTS = 2  # in a row; this many end the chat
KEPT_CONTROLS = "\n\t"


def is_terminal() -> bool:
    """Whether a person types: stdin and stdout are terminals."""
    return sys.stdin.isatty() and sys.stdout.isatty()


class Lines:
    """The lines that are asked: typed behind a prompt, or read from a pipe.

    Of a person's Ctrl-C the first one at the prompt is explained, and the second ends the chat; one during an answer
    ends the answer, and a second one the chat. A script is ended by any.
    """

    def __init__(self) -> None:
        self.by_person = is_terminal()
        self._answering = self._reading = False
        self._interrupts = 0
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # bad bytes are refused with the message
        if self.by_person:
            with suppress(ImportError):  # Windows has no such module; its terminal edits lines by itself
                import readline  # noqa: F401  (input() uses it once it is imported)

    def read(self) -> Iterator[str]:
        """Yields lines until the input ends. Raises Stopped when Ctrl-C ends the chat."""
        if not self.by_person:
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        with interrupts_to(self._take):
            while (line := self._typed()) is not None:
                yield line

    def _typed(self) -> str | None:
        """The next line that is typed, None at the end of the input (Ctrl-D)."""
        self._interrupts = 0
        while self._interrupts < MOST_INTERRUPTS:
            with suppress(KeyboardInterrupt):
                return self._input()
            self._interrupts += 1
            print("\n(Ctrl-C again, Ctrl-D or /exit ends the chat)" if self._interrupts < MOST_INTERRUPTS else "")
        raise Stopped(signal.SIGINT, "the chat was ended by Ctrl-C")

    def _input(self) -> str | None:
        self._reading = True
        try:
            return input(PROMPT)
        except EOFError:
            print()
            return None
        finally:
            self._reading = False

    def _take(self) -> bool:
        """Takes a Ctrl-C of a person; returns whether that is all that happens to it."""
        if self._reading:
            raise KeyboardInterrupt  # input() waits, so nothing is left half done
        if self._answering:
            self._interrupts += 1
        return not self._answering or self._interrupts < MOST_INTERRUPTS

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Is entered while the model answers: then signals wait for the next token."""
        with deferred_signals():
            self._interrupts, self._answering = 0, True
            try:
                yield
            finally:
                self._answering = False

    def interrupted(self) -> bool:
        """Whether a person has asked to end the answer."""
        return self._answering and self._interrupts > 0


def shown(text: str) -> str:
    """The text as a terminal gets it: control characters, which it would obey, as escapes."""
    if not is_terminal() or text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in KEPT_CONTROLS
        else char.encode("unicode_escape").decode()
        if ord(char) < 0xA0
        else char
        for char in text
    )
