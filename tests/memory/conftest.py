"""Reports with all kinds of entries, for tests of code that shows reports."""

from __future__ import annotations

import pytest

from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.report import MemoryReport, PhaseMemory, Timeline

MIB = 1 << 20
ODD_NAME = 'x.<b>&"bold"\''


def split(activations: int) -> MemoryBreakdown:
    sizes = {(Category.BASE_WEIGHT, f"layers.{n}.mlp.base_layer"): 16 * MIB for n in range(4)}
    sizes |= {(Category.ADAPTER, f"layers.{n}.mlp"): MIB // 3 for n in range(4)}
    sizes |= {(Category.ACTIVATION, f"layers.{n}"): activations // 4 for n in range(4)}
    return MemoryBreakdown({**sizes, (Category.TEMPORARY, ODD_NAME): 8 * MIB, (Category.OTHER, None): MIB})


def timeline(*peaks: MemoryBreakdown) -> Timeline:
    """A timeline with one phase for each peak, which rises to it and falls again."""
    points = [(None, MemoryBreakdown({(Category.BASE_WEIGHT, None): 16 * MIB}))]
    for name, peak in zip(("forward", "back<ward>"), peaks, strict=True):
        half = MemoryBreakdown({key: size // 2 for key, size in peak.items()})
        points += [(name, half), (name, peak), (name, half)]
    sizes = {key: tuple(point.by_category()[key] for _, point in points) for key in Category}
    return Timeline(tuple(name for name, _ in points), sizes)


@pytest.fixture
def measured() -> MemoryReport:
    """A report measured on a CPU, with names that need escaping."""
    first, second = split(40 * MIB), split(60 * MIB)
    phases = (
        PhaseMemory("forward", 2, 1.5, 100 * MIB, 300 * MIB, 450 * MIB, live_peak=first.total(), breakdown=first),
        PhaseMemory(
            "back<ward>", 2, 3.25, 300 * MIB, 310 * MIB, 440 * MIB, None, None, second.total(), second, ODD_NAME
        ),
        PhaseMemory("export", 1, resident_peak=460 * MIB),
    )
    return MemoryReport(phases, timeline=timeline(first, second))


@pytest.fixture
def predicted() -> MemoryReport:
    """A predicted report of the same work, without the export and without counters of a process."""
    first, second = split(44 * MIB), split(57 * MIB)
    phases = (
        PhaseMemory("forward", 1, live_peak=first.total(), breakdown=first),
        PhaseMemory("back<ward>", 1, live_peak=second.total(), breakdown=second),
    )
    return MemoryReport(phases, rehearsed=True, timeline=timeline(first, second))


@pytest.fixture
def on_device() -> MemoryReport:
    """A report of an accelerator's counters, without traced storages."""
    phases = (
        PhaseMemory("load", 1, 2.0, allocated_peak=700 * MIB, reserved_peak=704 * MIB),
        PhaseMemory("step", 9, 4.0, allocated_peak=900 * MIB, reserved_peak=1000 * MIB),
    )
    return MemoryReport(phases, context_bytes=300 * MIB)
