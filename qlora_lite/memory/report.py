"""`MemoryReport`: the memory of each phase of a run, rendered as a table for people or as plain data for programs.

Sizes are ints of bytes. They become KiB, MiB or GiB in this file only, when they are shown.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from qlora_lite.memory.breakdown import Category, MemoryBreakdown

NOT_MEASURED = "-"
Unit = tuple[int, str, int]  # bytes, name, decimals
UNITS: tuple[Unit, ...] = ((1 << 30, "GiB", 2), (1 << 20, "MiB", 1), (1 << 10, "KiB", 1))
# A table switches to a larger unit when its largest number is at least this many of that unit.
UNIT_FROM = 10


def difference(one: int | None, other: int | None) -> int | None:
    """Returns one - other; None if either is unknown."""
    return None if one is None or other is None else one - other


@dataclass(frozen=True)
class PhaseMemory:
    """The memory of one phase over all times that it was entered; unknown values are None.

    seconds: the sum over all entries. resident_start, resident_end: resident bytes of the process at the first entry
    and at the last exit. The peaks are the largest of any entry, in bytes: `resident_peak` of the process,
    `allocated_peak` and `reserved_peak` of the accelerator's allocator, `live_peak` of tensor storages. `breakdown` is
    the split of that last peak, and `peak_in` the module that was running at it; both are of the first
    `traced_entries` entries, None if no storages were traced.
    """

    name: str
    entries: int
    seconds: float | None = None
    resident_start: int | None = None
    resident_end: int | None = None
    resident_peak: int | None = None
    allocated_peak: int | None = None
    reserved_peak: int | None = None
    live_peak: int | None = None
    breakdown: MemoryBreakdown | None = None
    peak_in: str | None = None
    traced_entries: int | None = None

    @property
    def fragmentation(self) -> int | None:
        """Bytes that the accelerator's allocator reserves beyond those allocated: reserved_peak - allocated_peak."""
        return difference(self.reserved_peak, self.allocated_peak)

    @property
    def outside_tensors(self) -> int | None:
        """Bytes of the process outside of tensors, where these are in main memory: resident_peak - live_peak."""
        return difference(self.resident_peak, self.live_peak)

    def to_json(self) -> dict[str, object]:
        """Returns plain data for `json.dumps`, with one key for each field."""
        return {**vars(self), "breakdown": None if self.breakdown is None else self.breakdown.to_json()}


@dataclass(frozen=True)
class Timeline:
    """Live tensor bytes over a run: the bytes of each category at each point, and the phase of that point.

    A point stands for a stretch of events and is the largest of them, so that no peak is lost.
    """

    phases: tuple[str | None, ...]
    sizes: Mapping[Category, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.phases)

    def totals(self) -> tuple[int, ...]:
        """Returns the bytes of all categories together at each point."""
        return tuple(map(sum, zip(*self.sizes.values(), strict=True)))

    def spans(self) -> Iterator[tuple[str | None, int, int]]:
        """Yields (phase, its first point, the point after its last) for each stretch without a change of phase."""
        for phase, points in groupby(range(len(self)), key=lambda point: self.phases[point]):
            within = list(points)
            yield phase, within[0], within[-1] + 1

    def to_json(self) -> dict[str, object]:
        """Returns plain data for `json.dumps`."""
        return {"phases": list(self.phases), "bytes": {key.value: list(sizes) for key, sizes in self.sizes.items()}}


@dataclass(frozen=True)
class MemoryReport:
    """The phases of one run, in the order in which they were first entered.

    rehearsed: predicted on fake tensors instead of measured. timeline: None if no storages were traced. context_bytes:
    accelerator memory outside of the allocator (the context), None if it is unknown or there is no accelerator.
    """

    phases: tuple[PhaseMemory, ...]
    rehearsed: bool = False
    timeline: Timeline | None = None
    context_bytes: int | None = None

    def phase(self, name: str) -> PhaseMemory | None:
        """Returns the phase of this name; None if it was not entered."""
        return next((phase for phase in self.phases if phase.name == name), None)

    def peak_phase(self) -> PhaseMemory | None:
        """Returns the phase in which the most tensor bytes were alive; None if no storages were traced.

        Several phases can have the same peak, as an outer phase has that of its inner one. Then the timeline decides,
        and without one, the phase that was entered last.
        """
        peaks = [phase.live_peak for phase in self.phases if phase.live_peak is not None]
        highest = [phase for phase in self.phases if peaks and phase.live_peak == max(peaks)]
        if len(highest) > 1 and self.timeline:
            totals = self.timeline.totals()
            name = self.timeline.phases[totals.index(max(totals))]
            highest = [phase for phase in highest if phase.name == name] or highest
        return highest[-1] if highest else None

    def to_json(self) -> dict[str, object]:
        """Returns plain data for `json.dumps`."""
        return {
            "rehearsed": self.rehearsed,
            "phases": [phase.to_json() for phase in self.phases],
            "timeline": None if self.timeline is None else self.timeline.to_json(),
            "context_bytes": self.context_bytes,
        }


@dataclass(frozen=True)
class Column:
    """A column of sizes; `heading` is its name with the line breaks of the text table."""

    name: str
    heading: str
    size: Callable[[PhaseMemory], int | None]


def _category_column(category: Category) -> Column:
    def size(phase: PhaseMemory) -> int | None:
        return None if phase.breakdown is None else phase.breakdown.by_category()[category]

    return Column(category.label, category.heading, size)


ALLOCATED = Column("peak allocated", "peak\nallocated", lambda phase: phase.allocated_peak)
RESERVED = Column("peak reserved", "peak\nreserved", lambda phase: phase.reserved_peak)
RESIDENT = Column("peak resident", "peak\nresident", lambda phase: phase.resident_peak)
TENSORS = Column("peak tensors", "peak\ntensors", lambda phase: phase.live_peak)
CATEGORY_COLUMNS = tuple(map(_category_column, Category))


def has_values(column: Column, report: MemoryReport) -> bool:
    """Returns whether any phase has a size in this column."""
    return any(column.size(phase) is not None for phase in report.phases)


def table_columns(report: MemoryReport) -> list[Column]:
    """Returns the columns of sizes: the accelerator's or else the process's, then those of tensors if traced."""
    counters = [ALLOCATED, RESERVED] if has_values(ALLOCATED, report) else [RESIDENT]
    traced = has_values(CATEGORY_COLUMNS[0], report)
    return [*counters, *((TENSORS, *CATEGORY_COLUMNS) if traced else ())]


def unit_for(largest: int) -> Unit:
    """Returns the unit for a table whose largest number is `largest` bytes."""
    return next((unit for unit in UNITS if abs(largest) >= UNIT_FROM * unit[0]), UNITS[-1])


def format_size(size: int | None, unit: Unit) -> str:
    """Returns a size in this unit, without its name: `1,234.5`; `-` if it is unknown."""
    # Adding 0 turns -0.0 into 0.0.
    return NOT_MEASURED if size is None else f"{round(size / unit[0], unit[2]) + 0.0:,.{unit[2]}f}"


def readable_bytes(size: int) -> str:
    """Returns a size with its unit, whichever suits it: `15.00 GiB`."""
    unit = unit_for(size)
    return f"{format_size(size, unit)} {unit[1]}"


def axis_ticks(largest: int, most: int = 5) -> list[tuple[int, str]]:
    """Returns (bytes, label) of the ticks of an axis from 0 to `largest` bytes, at most `most` of them above 0.

    Ticks stand at multiples of 1, 2 or 5 times a power of ten of the last digit that the unit is shown with.
    """
    scale, name, decimals = unit_for(largest)
    last_digit = 10**decimals  # this many last digits make one of the unit
    steps = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    step = next(step for step in steps if step * scale * most >= largest * last_digit)
    unit = (scale, name, 0 if step % last_digit == 0 else decimals)
    sizes = (number * step * scale // last_digit for number in range(most + 1))
    return [(size, f"{format_size(size, unit)} {name}" if size else "0") for size in sizes if size <= largest]


def peak_sentence(report: MemoryReport) -> str | None:
    """Returns a sentence with the phase, the module and the split of the peak; None if no storages were traced."""
    phase = report.peak_phase()
    if phase is None or phase.live_peak is None:
        return None
    unit = unit_for(phase.live_peak)
    where = f"in {phase.name}" + (f" of {phase.peak_in}" if phase.peak_in else "")
    verb = "would be" if report.rehearsed else "were"
    sentence = f"at the peak, {where}, {readable_bytes(phase.live_peak)} of tensors {verb} alive"
    if phase.breakdown is None:
        return sentence
    sizes = sorted(phase.breakdown.by_category().items(), key=lambda item: -item[1])
    parts = ", ".join(f"{key.label} {format_size(size, unit)}" for key, size in sizes if size)
    return f"{sentence}: {parts}"


def render(report: MemoryReport, width: int = 120) -> str:
    """Returns the report as a table, one row for each phase, at most `width` characters wide.

    The unit follows below, and the sentence about the peak if storages were traced.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not report.phases:
        return "no phase was entered\n"
    columns = table_columns(report)
    sizes = [[column.size(phase) for column in columns] for phase in report.phases]
    known = [size for row in sizes for size in row if size is not None]
    unit = unit_for(max(known, default=0))
    # This box already puts a blank between columns, so cells need no padding.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column("phase", overflow="fold", vertical="bottom")
    for heading in ("times", "seconds", *(column.heading for column in columns)):
        table.add_column(heading, justify="right", overflow="fold", vertical="bottom")
    for phase, row in zip(report.phases, sizes, strict=True):
        seconds = NOT_MEASURED if phase.seconds is None else f"{phase.seconds:,.2f}"
        cells = (str(phase.entries), seconds, *(format_size(size, unit) for size in row))
        table.add_row(Text(phase.name), *cells)
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    legend = f"sizes in {unit[1]}" + (f"; {NOT_MEASURED} is not measured" if len(known) < sum(map(len, sizes)) else "")
    traced = [phase.traced_entries for phase in report.phases if phase.traced_entries is not None]
    if any(phase.traced_entries not in (None, phase.entries) for phase in report.phases):
        legend += f"; tensors are those of the first {max(traced)} times of a phase"
    if any(phase.resident_end is not None and phase.resident_peak is None for phase in report.phases):
        legend += "; this system counts no peaks of resident memory over a phase"
    below = (part for text in (legend, peak_sentence(report) or "") for part in textwrap.wrap(text, width))
    return "".join(line.rstrip() + "\n" for line in (*captured.get().splitlines(), *below))
