"""Progress of long work on stderr: bars on a terminal, one line for work that takes over two seconds elsewhere.

    with working("packing", total, BYTES) as work:
        for weight in weights:
            ...
            work.advance(weight.nbytes)

Code that works says how far it is; a command, or `train`, shows it (`progress_shown`). Nothing is shown otherwise, and
nothing ever goes to stdout, which is the program's. Of several processes the first one shows its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

BYTES = "bytes"
# Seconds after which work has a bar, so that short work does not flicker, and after which it has a line elsewhere.
BAR_AFTER, LINE_AFTER = 0.5, 2.0
MIB = 1 << 20
NARROW, BAR_WIDTH, NARROW_BAR_WIDTH = 100, 28, 12  # columns of a terminal, and of the bar

DUMB = ("dumb", "unknown")  # as rich has them


class _Display(Protocol):
    """Shows work that begins, goes on and ends."""

    def begin(self, work: Work) -> None: ...
    def update(self, work: Work) -> None: ...
    def end(self, work: Work) -> None: ...
    def tell(self, text: str) -> None: ...
    def close(self) -> None: ...


@dataclass(eq=False)
class Work:
    """Work that goes on: its name, how much of it there is, None if that is not known, and how much is done.

    figures: text behind the bar. has_line: whether it gets a line where there are no bars.
    """

    name: str
    total: int | None = None
    unit: str = ""
    has_line: bool = True
    display: _Display | None = None
    done: int = 0
    figures: str = ""
    began: float = field(default_factory=time.monotonic)

    @property
    def has_bar(self) -> bool:
        """Whether it is shown as a bar, on a terminal."""
        return isinstance(self.display, _Bars)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def advance(self, count: int = 1) -> None:
        """Notes that more is done."""
        self.reach(self.done + count)

    def reach(self, done: int, figures: str = "") -> None:
        """Notes how much is done in all."""
        self.done, self.figures = done, figures or self.figures
        if self.display is not None:
            self.display.update(self)

    def amount(self) -> str:
        """Returns how much is done, and of how much: `12/64`, `100 of 538 MiB`."""
        if self.unit != BYTES:
            of = "" if self.total is None else f"/{self.total:,}"
            return f"{self.done:,}{of}{self.unit and ' '}{self.unit}"
        return (
            f"{self.done // MIB:,} MiB" if self.total is None else f"{self.done // MIB:,} of {self.total // MIB:,} MiB"
        )


class _Bars:
    """One display of bars for all work, on a terminal. It is there while work goes on, and vanishes after it."""

    def __init__(self) -> None:
        self._shown: Progress | None = None
        self._tasks: dict[Work, TaskID] = {}

    def begin(self, work: Work) -> None:
        if self._shown is None:
            self._shown = _bars(_console())
            self._shown.start()
        self._tasks[work] = self._shown.add_task(work.name, total=work.total, amount=work.amount(), figures="")

    def update(self, work: Work) -> None:
        if self._shown is not None and work in self._tasks:
            amount, figures = work.amount(), work.figures
            self._shown.update(self._tasks[work], completed=work.done, amount=amount, figures=figures)

    def end(self, work: Work) -> None:
        if self._shown is not None and work in self._tasks:
            self._shown.remove_task(self._tasks.pop(work))
            if not self._tasks:
                self.close()

    def close(self) -> None:
        if self._shown is not None:
            self._shown.stop()
        self._shown = None
        self._tasks.clear()

    def tell(self, text: str) -> None:
        _print(_console() if self._shown is None else self._shown.console, text)


class _Lines:
    """One line for work that takes over two seconds: how far it is by then, or how long it took."""

    def __init__(self) -> None:
        self._told: set[Work] = set()

    def begin(self, work: Work) -> None:
        pass

    def update(self, work: Work) -> None:
        if work.has_line and work not in self._told and work.seconds >= LINE_AFTER:
            self._told.add(work)
            self.tell(f"{work.name}: {work.amount()} after {work.seconds:.0f} seconds")

    def end(self, work: Work) -> None:
        if work.has_line and work not in self._told and work.seconds >= LINE_AFTER:
            self.tell(f"{work.name}: {work.seconds:.0f} seconds")
        self._told.discard(work)

    def close(self) -> None:
        pass

    def tell(self, text: str) -> None:
        _print(_console(), text)


_display: _Bars | _Lines | None = None


def _can_erase() -> bool:
    """Whether stderr is a terminal on which a bar can be erased. A dumb one would keep each state of it as a line."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in DUMB


@contextmanager
def progress_shown(shown: bool = True) -> Iterator[None]:
    """Within the block work is shown on stderr; with False it is not, also within a block in which it would be."""
    global _display
    before = _display
    made: _Bars | _Lines | None = None
    if not shown or os.environ.get("RANK", "0") != "0":  # the variable of launchers: one process shows its progress
        _display = None
    elif before is None:
        _display = made = _Bars() if _can_erase() else _Lines()
    try:
        yield
    finally:
        _display = before
        if made is not None:
            made.close()  # of work that an error ended, too


@contextmanager
def working(name: str, total: int | None = None, unit: str = "", has_line: bool = True) -> Iterator[Work]:
    """Yields the work that is done within the block; see the docstring of this file.

    total: how much there is, None if that is not known. unit: of it; BYTES are shown as MiB.
    """
    work = Work(name, total, unit, has_line, _display)
    if work.display is None:
        yield work
        return
    work.display.begin(work)
    try:
        yield work
    except BaseException:
        work.has_line = False  # the error is told
        raise
    finally:
        work.display.end(work)


def tell(text: str) -> None:
    """Prints a line on stderr, above the bars, where progress is shown."""
    if _display is not None:
        _display.tell(text)


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _bars(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column, Table
    from rich.text import Text

    class Figures(TextColumn):
        """Text that gives way where the terminal is too narrow, and stays one line."""

        def render(self, task: Any) -> Text:
            text = super().render(task)
            text.no_wrap, text.overflow = True, "ellipsis"
            return text

    class Bars(Progress):
        """Without tasks that have just begun."""

        def make_tasks_table(self, tasks: object) -> Table:
            return super().make_tasks_table([task for task in self.tasks if (task.elapsed or 0) >= BAR_AFTER])

    width = NARROW_BAR_WIDTH if console.width < NARROW else BAR_WIDTH
    # A column that may wrap is the one that rich cuts first.
    kept, cut = Column(no_wrap=True), Column(no_wrap=False)
    name, amount = (TextColumn(f"{{task.{text}}}", markup=False) for text in ("description", "fields[amount]"))
    left = TimeRemainingColumn(compact=True, table_column=kept)
    figures = Figures("{task.fields[figures]}", markup=False, table_column=cut)
    columns = name, BarColumn(width, table_column=kept), amount, left, figures
    # rich prints what goes to a redirected stdout on its own console, so stdout is its own only where both are one.
    redirected = sys.stdout.isatty()
    return Bars(*columns, console=console, transient=True, redirect_stdout=redirected, redirect_stderr=True)
