"""Renders the tables of a report's page, and the sizes in them, as HTML.

Every size is a `<data value="bytes">` with a readable size inside; every text of a report is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby
from typing import NamedTuple

from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.comparison import SizeComparison, compare, format_percent
from qlora_lite.memory.drawing.svg import share_bar
from qlora_lite.memory.drawing.treemap import ITSELF, NO_MODULE, group_repeated
from qlora_lite.memory.report import (
    ALLOCATED,
    CATEGORY_COLUMNS,
    RESERVED,
    RESIDENT,
    TENSORS,
    Column,
    MemoryReport,
    PhaseMemory,
    Unit,
    format_size,
    has_values,
    readable_bytes,
    unit_for,
)

UNKNOWN = '<span class="unknown">unknown</span>'
MAX_MODULES, SMALLEST_SHARE = 14, 0.001
FRAGMENTATION = Column("fragmen\u00adtation", "", lambda phase: phase.fragmentation)
REST_OF_PROCESS = Column("rest of the process", "", lambda phase: phase.outside_tensors)


class Row(NamedTuple):
    """A row of a table, in HTML. Rows of the same group must be adjacent."""

    heading: str
    cells: list[str]
    group: str | None = None


def size_html(size: int | None, unit: Unit | None = None, is_named: bool = False) -> str:
    """Returns a size as HTML. The unit is named if `is_named`, or if none is given and one is chosen."""
    if size is None:
        return UNKNOWN if unit is None else f'<span class="unknown" title="unknown">{format_size(None, unit)}</span>'
    text = readable_bytes(size) if unit is None else format_size(size, unit) + (f" {unit[1]}" if is_named else "")
    zero = "" if size else ' class="nil"'
    return f'<data{zero} value="{size}" title="{size:,} bytes">{text}</data>'


def path_html(path: str) -> str:
    """Returns the escaped path of a module, with line breaks allowed after its dots."""
    return escape(path).replace(".", ".<wbr>")


def table(css_class: str, caption: str, headings: Iterable[str], rows: Iterable[Row]) -> Iterator[str]:
    """Yields a table that scrolls by itself where it is too wide. Caption, headings and cells are HTML."""
    yield f'<div class="wide-table" tabindex="0" role="region" aria-label="{css_class}"><table class="{css_class}">'
    yield f"<caption><span>{caption}</span></caption>"
    columns = [f'<th scope="col">{heading}</th>' for heading in headings]
    yield f"<thead><tr>{''.join(columns)}</tr></thead>"
    for group, members in groupby(rows, key=lambda row: row.group):
        yield "<tbody>"
        if group is not None:
            yield f'<tr class="group"><th scope="rowgroup" colspan="{len(columns)}">{group}</th></tr>'
        for row in members:
            yield f'<tr><th scope="row">{row.heading}</th>{"".join(f"<td>{cell}</td>" for cell in row.cells)}</tr>'
        yield "</tbody>"
    yield "</table></div>"


def module_table(breakdown: MemoryBreakdown) -> Iterator[str]:
    """Yields a table of the largest modules, with the modules of repeated blocks added up."""
    groups = [(name, count, sizes) for name, (count, sizes) in group_repeated(breakdown).items()]
    whole, unit = breakdown.total(), unit_for(breakdown.total())
    shown = [group for group in groups[:MAX_MODULES] if sum(group[2].values()) >= SMALLEST_SHARE * whole]
    rest = groups[len(shown) :]
    longest = max(sum(sizes.values()) for _, _, sizes in groups)
    rows = [
        (NO_MODULE, "", sizes) if name is None else (path_html(name) or ITSELF, str(count), sizes)
        for name, count, sizes in shown
    ]
    if rest:
        sums = {key: sum(sizes[key] for _, _, sizes in rest) for key in Category}
        rows.append(("all others", str(sum(count for name, count, _ in rest if name is not None)), sums))
    caption = f"The largest modules; modules of repeated blocks (*) are added up; sizes in {unit[1]}"
    cells = (Row(name, [count, *_module_cells(sizes, whole, longest, unit)]) for name, count, sizes in rows)
    yield from table("modules", caption, ("module", "number", "size", "share", ""), cells)


def _module_cells(sizes: dict[Category, int], whole: int, longest: int, unit: Unit) -> list[str]:
    size = sum(sizes.values())
    return [size_html(size, unit), f"{100 * size / whole:.1f} %", share_bar(sizes, longest)]


def phase_table(report: MemoryReport) -> Iterator[str]:
    """Yields a table with a row for each phase: its counters, then the tensors at its peak."""
    counters = [ALLOCATED, RESERVED, FRAGMENTATION] if has_values(ALLOCATED, report) else [RESIDENT, REST_OF_PROCESS]
    traced = [column for column in (TENSORS, *CATEGORY_COLUMNS) if any(map(column.size, report.phases))]
    columns = [*counters, *traced]
    unit = unit_for(max((column.size(phase) or 0 for column in columns for phase in report.phases), default=0))
    headings = ["phase", "times", "seconds", *(column.name for column in columns)]
    caption = f"The largest peaks of each phase; sizes in {unit[1]}; {format_size(None, unit)} is unknown"
    rows = (Row(_phase_heading(phase), _phase_cells(phase, columns, unit)) for phase in report.phases)
    yield from table("phases", caption, headings, rows)


def _phase_heading(phase: PhaseMemory) -> str:
    place = f"<small>peak in {path_html(phase.peak_in)}</small>" if phase.peak_in else ""
    return escape(phase.name) + place


def _phase_cells(phase: PhaseMemory, columns: list[Column], unit: Unit) -> list[str]:
    seconds = format_size(None, unit) if phase.seconds is None else f"{phase.seconds:,.2f}"
    return [str(phase.entries), seconds, *(size_html(column.size(phase), unit) for column in columns)]


def comparison_table(predicted: MemoryReport, measured: MemoryReport) -> Iterator[str]:
    """Yields a table with a row for each size that `compare` returns; nothing if it returns none."""
    rows = compare(predicted, measured)
    if not rows:
        return
    unit = unit_for(max(size for row in rows for size in (row.predicted, row.measured) if size is not None))
    unknown = format_size(None, unit)
    caption = f"Difference is predicted − measured, percent is of measured; sizes in {unit[1]}; {unknown} is unknown"
    headings = ("", "predicted", "measured", "difference", "percent")
    cells = (Row(row.name, _comparison_cells(row, unit), escape(row.phase)) for row in rows)
    yield from table("comparison", caption, headings, cells)


def _comparison_cells(row: SizeComparison, unit: Unit) -> list[str]:
    sizes = (size_html(size, unit) for size in (row.predicted, row.measured, row.difference))
    return [*sizes, format_percent(row.percent)]
