"""Compares a predicted and a measured report of the same work, phase by phase and size by size."""

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
    format_size,
    has_values,
    unit_for,
)

COMPARED_COLUMNS = (ALLOCATED, RESERVED, RESIDENT, TENSORS, *CATEGORY_COLUMNS)


@dataclass(frozen=True)
class SizeComparison:
    """One size of one phase in both reports, in bytes; None where a report does not have it."""

    phase: str
    name: str
    predicted: int | None
    measured: int | None

    @property
    def difference(self) -> int | None:
        """predicted - measured, in bytes."""
        return difference(self.predicted, self.measured)

    @property
    def percent(self) -> float | None:
        """The difference in percent of the measured size; None if that is 0 or unknown."""
        return None if self.difference is None or not self.measured else 100 * self.difference / self.measured


def compare(predicted: MemoryReport, measured: MemoryReport) -> list[SizeComparison]:
    """Returns every size that both reports have of some phase, phase by phase, without those that are 0 in both.

    Phases are in the measured order, followed by those that were only predicted.
    """
    shared = [column for column in COMPARED_COLUMNS if has_values(column, predicted) and has_values(column, measured)]
    names = dict.fromkeys(phase.name for phase in (*measured.phases, *predicted.phases))
    return [row for name in names for row in _compared(name, shared, predicted.phase(name), measured.phase(name))]


def _compared(
    name: str, columns: list[Column], predicted: PhaseMemory | None, measured: PhaseMemory | None
) -> Iterator[SizeComparison]:
    for column in columns:
        sizes = [None if phase is None else column.size(phase) for phase in (predicted, measured)]
        if any(sizes):
            yield SizeComparison(name, column.name, *sizes)


def format_percent(percent: float | None) -> str:
    """Returns `+1.2 %`; `-` if it is unknown."""
    return NOT_MEASURED if percent is None else f"{round(percent, 1) + 0.0:+,.1f} %"


def render_comparison(predicted: MemoryReport, measured: MemoryReport, width: int = 120) -> str:
    """Returns a table with one row for each size that `compare` returns, at most `width` characters wide."""
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
        sizes = (format_size(size, unit) for size in (row.predicted, row.measured, row.difference))
        table.add_row(Text("" if row.phase == last else row.phase), row.name, *sizes, format_percent(row.percent))
        last = row.phase
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    legend = f"sizes in {unit[1]}; difference is predicted - measured; {NOT_MEASURED} is unknown"
    return "".join(line.rstrip() + "\n" for line in (*captured.get().splitlines(), legend))
