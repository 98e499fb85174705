"""Two reports of the same work beside each other: what was predicted of each phase, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_lite.memory.report import (
    ALLOCATED,
    CATEGORY_COLUMNS,
    NOT_MEASURED,
    RESERVED,
    RESIDENT,
    TENSORS,
    Column,
    MemoryReport,
    PhaseMemory,
    difference,
    is_known,
    unit_for,
    written,
)

COMPARED = (ALLOCATED, RESERVED, RESIDENT, TENSORS, *CATEGORY_COLUMNS)


@dataclass(frozen=True)
class Compared:
    """One size of one phase in both reports, in bytes; None where a report does not know it."""

    phase: str
    name: str
    predicted: int | None
    measured: int | None

    @property
    def difference(self) -> int | None:
        """Bytes predicted too much, or, below zero, too little."""
        return difference(self.predicted, self.measured)

    @property
    def percent(self) -> float | None:
        """The difference in percent of what was measured; None if that is nothing."""
        return None if self.difference is None or not self.measured else 100 * self.difference / self.measured


def compare(predicted: MemoryReport, measured: MemoryReport) -> list[Compared]:
    """Every size that both reports know of some phase, where it is not 0 in both, phase by phase.

    The phases stand in the measured order, those that were only predicted after them.
    """
    shared = [column for column in COMPARED if is_known(column, predicted) and is_known(column, measured)]
    names = dict.fromkeys(phase.name for phase in (*measured.phases, *predicted.phases))
    return [row for name in names for row in _compared(name, shared, predicted.phase(name), measured.phase(name))]


def _compared(
    name: str, columns: list[Column], predicted: PhaseMemory | None, measured: PhaseMemory | None
) -> Iterator[Compared]:
    for column in columns:
        one, other = (None if phase is None else column.size(phase) for phase in (predicted, measured))
        if one or other:
            yield Compared(name, column.name, one, other)


def written_percent(percent: float | None) -> str:
    """`+1.2 %`, or that it is unknown."""
    return NOT_MEASURED if percent is None else f"{round(percent, 1) + 0.0:+,.1f} %"


def render_comparison(predicted: MemoryReport, measured: MemoryReport, width: int = 120) -> str:
    """A table of both, one row for each phase and size that `compare` gives; `width` characters wide at most."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = compare(predicted, measured)
    if not rows:
        return "no size was both predicted and measured\n"
    unit = unit_for(max(size for row in rows for size in (row.predicted, row.measured) if size is not None))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for heading in ("phase", "bytes of"):
        table.add_column(heading, overflow="fold")
    for heading in ("predicted", "measured", "difference", "percent"):
        table.add_column(heading, justify="right", overflow="fold")
    last = None
    for row in rows:
        sizes = (written(size, unit) for size in (row.predicted, row.measured, row.difference))
        table.add_row(Text("" if row.phase == last else row.phase), row.name, *sizes, written_percent(row.percent))
        last = row.phase
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    legend = f"sizes in {unit[1]}; difference is predicted - measured; {NOT_MEASURED} is unknown"
    return "".join(line.rstrip() + "\n" for line in (*captured.get().splitlines(), legend))
