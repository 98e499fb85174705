"""What is known of each phase's memory, and one renderer for it: a table for people, plain data for programs.

Bytes become KiB, MiB or GiB here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_lite.memory.breakdown import Category, MemoryBreakdown

NOT_MEASURED = "-"
UNITS = ((1 << 30, "GiB", 2), (1 << 20, "MiB", 1), (1 << 10, "KiB", 1))
# A table stays in the smaller unit until its largest number would reach five digits.
UNIT_FROM = 10
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

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {
            "rehearsed": self.rehearsed,
            "phases": [phase.to_json() for phase in self.phases],
            "timeline": None if self.timeline is None else self.timeline.to_json(),
            "context_bytes": self.context_bytes,
        }


@dataclass(frozen=True)
class _Column:
    heading: str
    size: Callable[[PhaseMemory], int | None]


def _category_column(category: Category) -> _Column:
    def size(phase: PhaseMemory) -> int | None:
        return None if phase.breakdown is None else phase.breakdown.by_category()[category]

    return _Column(CATEGORY_HEADINGS[category], size)


def _columns(report: MemoryReport) -> list[_Column]:
    """The columns of sizes: an accelerator's, or else the process's; then the tensors' if they were traced."""
    columns = [
        _Column("peak\nallocated", lambda phase: phase.allocated_peak),
        _Column("peak\nreserved", lambda phase: phase.reserved_peak),
    ]
    if all(phase.allocated_peak is None for phase in report.phases):
        columns = [_Column("peak\nresident", lambda phase: phase.resident_peak)]
    if any(phase.breakdown is not None for phase in report.phases):
        columns.append(_Column("peak\ntensors", lambda phase: phase.live_peak))
        columns += [_category_column(category) for category in Category]
    return columns


def _unit_for(largest: int) -> tuple[int, str, int]:
    """(bytes, name, decimals) of the unit that a table with this largest number is written in."""
    return next((unit for unit in UNITS if largest >= UNIT_FROM * unit[0]), UNITS[-1])


def _written(size: int | None, unit: tuple[int, str, int]) -> str:
    return NOT_MEASURED if size is None else f"{size / unit[0]:,.{unit[2]}f}"


def render(report: MemoryReport, width: int = 120) -> str:
    """The report as a table, one row for each phase, `width` characters wide at most; the last line names the unit."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not report.phases:
        return "no phase was entered\n"
    columns = _columns(report)
    sizes = [[column.size(phase) for column in columns] for phase in report.phases]
    known = [size for row in sizes for size in row if size is not None]
    unit = _unit_for(max(known, default=0))
    # The rule under the headings comes with a blank between columns, so cells need no padding of their own.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column("phase", overflow="fold", vertical="bottom")
    for heading in ("times", "seconds", *(column.heading for column in columns)):
        table.add_column(heading, justify="right", overflow="fold", vertical="bottom")
    for phase, row in zip(report.phases, sizes, strict=True):
        seconds = NOT_MEASURED if phase.seconds is None else f"{phase.seconds:,.2f}"
        cells = (str(phase.entries), seconds, *(_written(size, unit) for size in row))
        table.add_row(Text(phase.name), *cells)
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    legend = f"sizes in {unit[1]}" + (f"; {NOT_MEASURED} is not measured" if len(known) < sum(map(len, sizes)) else "")
    return "".join(line.rstrip() + "\n" for line in (*captured.get().splitlines(), legend))


def readable_bytes(size: int) -> str:
    """A size in the unit that suits it: `1.50 GiB`."""
    unit = _unit_for(size)
    return f"{_written(size, unit)} {unit[1]}"
