"""What is known of each phase's memory, and one renderer for it: a table for people, plain data for programs.

Bytes become KiB, MiB or GiB here and nowhere else.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from qlora_lite.memory.breakdown import Category, MemoryBreakdown

NOT_MEASURED = "-"
Unit = tuple[int, str, int]  # bytes, name, decimals
UNITS: tuple[Unit, ...] = ((1 << 30, "GiB", 2), (1 << 20, "MiB", 1), (1 << 10, "KiB", 1))
# A table stays in the smaller unit until its largest number would reach five digits.
UNIT_FROM = 10
CATEGORY_NAMES = {
    Category.BASE_WEIGHT: "base weights",
    Category.QUANT_STATE: "quantization state",
    Category.ADAPTER: "adapters",
    Category.GRADIENT: "gradients",
    Category.OPTIMIZER_STATE: "optimizer state",
    Category.ACTIVATION: "activations",
    Category.TEMPORARY: "temporaries",
    Category.OTHER: "other",
}
CATEGORY_HEADINGS = {
    Category.BASE_WEIGHT: "base\nweights",
    Category.QUANT_STATE: "quant.\nstate",
    Category.ADAPTER: "adapters",
    Category.GRADIENT: "gradients",
    Category.OPTIMIZER_STATE: "optimizer\nstate",
    Category.ACTIVATION: "activa-\ntions",
    Category.TEMPORARY: "tempo-\nraries",
    Category.OTHER: "other",
}


def difference(one: int | None, other: int | None) -> int | None:
    """one - other; None if either is unknown."""
    return None if one is None or other is None else one - other


@dataclass(frozen=True)
class PhaseMemory:
    """One phase, over all times that it was entered; what was not measured is None.

    seconds: their sum. resident_start, resident_end: resident bytes of the process when the phase was first entered
    and last left. All peaks are the largest of any time, in bytes: `resident_peak` of the process, `allocated_peak`
    and `reserved_peak` of the accelerator's allocator, `live_peak` of tensor storages, with their `breakdown` then and
    `peak_in`, the module that was running.
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

    @property
    def fragmentation(self) -> int | None:
        """Bytes that the accelerator's allocator holds beyond those that are allocated: reserved - allocated."""
        return difference(self.reserved_peak, self.allocated_peak)

    @property
    def beside_tensors(self) -> int | None:
        """Bytes of the process beside its tensors, peak - peak: the rest of it, where tensors are in main memory."""
        return difference(self.resident_peak, self.live_peak)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; every field under its own name, unknown ones as None."""
        return {**vars(self), "breakdown": None if self.breakdown is None else self.breakdown.to_json()}


@dataclass(frozen=True)
class Timeline:
    """Live tensor bytes over a run: of each category at each point, and the phase that the point lies in.

    A point stands for a stretch of changes, and is the largest of them, so that thinning loses no peak.
    """

    phases: tuple[str | None, ...]
    sizes: Mapping[Category, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.phases)

    def totals(self) -> tuple[int, ...]:
        """Bytes of all categories together at each point."""
        return tuple(map(sum, zip(*self.sizes.values(), strict=True)))

    def spans(self) -> Iterator[tuple[str | None, int, int]]:
        """(phase, its first point, the point after its last) for each stretch without a change of phase."""
        for phase, points in groupby(range(len(self)), key=lambda point: self.phases[point]):
            within = list(points)
            yield phase, within[0], within[-1] + 1

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {"phases": list(self.phases), "bytes": {key.value: list(sizes) for key, sizes in self.sizes.items()}}


@dataclass(frozen=True)
class MemoryReport:
    """The phases of one run, in the order in which they were first entered.

    rehearsed: predicted on fake tensors, not measured. timeline: None if no storages were followed. context_bytes: what
    the device takes for itself beside its allocator, None where that is unknown or there is no device.
    """

    phases: tuple[PhaseMemory, ...]
    rehearsed: bool = False
    timeline: Timeline | None = None
    context_bytes: int | None = None

    def phase(self, name: str) -> PhaseMemory | None:
        """The phase of this name, None if it was not entered."""
        return next((phase for phase in self.phases if phase.name == name), None)

    def peak_phase(self) -> PhaseMemory | None:
        """The phase in which the most tensor bytes were alive; None if no storages were followed.

        Where several have the same peak (an outer phase has that of its inner one), the timeline decides, and without
        one, the phase that was entered last.
        """
        peaks = [phase.live_peak for phase in self.phases if phase.live_peak is not None]
        highest = [phase for phase in self.phases if peaks and phase.live_peak == max(peaks)]
        if len(highest) > 1 and self.timeline:
            totals = self.timeline.totals()
            there = self.timeline.phases[totals.index(max(totals))]
            highest = [phase for phase in highest if phase.name == there] or highest
        return highest[-1] if highest else None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {
            "rehearsed": self.rehearsed,
            "phases": [phase.to_json() for phase in self.phases],
            "timeline": None if self.timeline is None else self.timeline.to_json(),
            "context_bytes": self.context_bytes,
        }


@dataclass(frozen=True)
class Column:
    """A column of sizes; its heading as the text table breaks it."""

    name: str
    heading: str
    size: Callable[[PhaseMemory], int | None]


def _category_column(category: Category) -> Column:
    def size(phase: PhaseMemory) -> int | None:
        return None if phase.breakdown is None else phase.breakdown.by_category()[category]

    return Column(CATEGORY_NAMES[category], CATEGORY_HEADINGS[category], size)


ALLOCATED = Column("peak allocated", "peak\nallocated", lambda phase: phase.allocated_peak)
RESERVED = Column("peak reserved", "peak\nreserved", lambda phase: phase.reserved_peak)
RESIDENT = Column("peak resident", "peak\nresident", lambda phase: phase.resident_peak)
TENSORS = Column("peak tensors", "peak\ntensors", lambda phase: phase.live_peak)
CATEGORY_COLUMNS = tuple(map(_category_column, Category))


def is_known(column: Column, report: MemoryReport) -> bool:
    """Whether any phase has a size in this column."""
    return any(column.size(phase) is not None for phase in report.phases)


def table_columns(report: MemoryReport) -> list[Column]:
    """The columns of sizes: an accelerator's, or else the process's; then the tensors' if they were traced."""
    counters = [ALLOCATED, RESERVED] if is_known(ALLOCATED, report) else [RESIDENT]
    traced = is_known(CATEGORY_COLUMNS[0], report)
    return [*counters, *((TENSORS, *CATEGORY_COLUMNS) if traced else ())]


def unit_for(largest: int) -> Unit:
    """The unit that a table with this largest number is written in."""
    return next((unit for unit in UNITS if abs(largest) >= UNIT_FROM * unit[0]), UNITS[-1])


def written(size: int | None, unit: Unit) -> str:
    """A size without its unit: `1,234.5`; unknown ones as `-`."""
    # Adding 0 takes the sign from a zero.
    return NOT_MEASURED if size is None else f"{round(size / unit[0], unit[2]) + 0.0:,.{unit[2]}f}"


def readable_bytes(size: int) -> str:
    """A size in the unit that suits it: `1.50 GiB`."""
    unit = unit_for(size)
    return f"{written(size, unit)} {unit[1]}"


def axis_ticks(largest: int, most: int = 5) -> list[tuple[int, str]]:
    """(bytes, label) of the marks of an axis from 0 to `largest` bytes: whole steps of 1, 2 or 5 in a unit's digits."""
    scale, name, decimals = unit_for(largest)
    last_digit = 10**decimals  # a unit has so many of the last digit that it is written with
    steps = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    step = next(step for step in steps if step * scale * most >= largest * last_digit)
    unit = (scale, name, 0 if step % last_digit == 0 else decimals)
    sizes = (number * step * scale // last_digit for number in range(most + 1))
    return [(size, f"{written(size, unit)} {name}" if size else "0") for size in sizes if size <= largest]


def peak_sentence(report: MemoryReport) -> str | None:
    """When, where and what the peak of the tensors was; None if no storages were followed."""
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
    parts = ", ".join(f"{CATEGORY_NAMES[key]} {written(size, unit)}" for key, size in sizes if size)
    return f"{sentence}: {parts}"


def render(report: MemoryReport, width: int = 120) -> str:
    """The report as a table, one row for each phase, `width` characters wide at most.

    The unit stands below it, and after that, if storages were followed, what the peak was.
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
    # The rule under the headings comes with a blank between columns, so cells need no padding of their own.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column("phase", overflow="fold", vertical="bottom")
    for heading in ("times", "seconds", *(column.heading for column in columns)):
        table.add_column(heading, justify="right", overflow="fold", vertical="bottom")
    for phase, row in zip(report.phases, sizes, strict=True):
        seconds = NOT_MEASURED if phase.seconds is None else f"{phase.seconds:,.2f}"
        cells = (str(phase.entries), seconds, *(written(size, unit) for size in row))
        table.add_row(Text(phase.name), *cells)
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    legend = f"sizes in {unit[1]}" + (f"; {NOT_MEASURED} is not measured" if len(known) < sum(map(len, sizes)) else "")
    sentence = textwrap.wrap(peak_sentence(report) or "", width)
    return "".join(line.rstrip() + "\n" for line in (*captured.get().splitlines(), legend, *sentence))
