"""Tests of the counters of the process and of a pretended accelerator in the phases of a profiler."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from qlora_lite.memory import counters
from qlora_lite.memory.counters import resident_bytes
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.memory.report import PhaseMemory, render

MIB = 1 << 20
needs_peak_reset = pytest.mark.skipif(
    not counters.reset_resident_peak() or resident_bytes("VmHWM") is None,
    reason="the resident peak can be reset on Linux only, and only where /proc is writable",
)


def measured(profiler: MemoryProfiler, name: str) -> PhaseMemory:
    phase = profiler.report().phase(name)
    assert phase is not None
    return phase


def touched(size: int) -> None:
    """Writes to every page of `size` bytes and unmaps them, which free() would not always do."""
    with mmap.mmap(-1, size) as pages:
        for page in range(0, size, mmap.PAGESIZE):
            pages[page] = 1


@needs_peak_reset
@pytest.mark.parametrize("trace", [False, True])
def test_a_peak_within_a_phase_is_caught_there_and_nowhere_else(trace: bool) -> None:
    with MemoryProfiler(trace=trace) as profiler:
        for size in (64 * MIB, 16 * MIB):
            with profiler.phase("large"):
                touched(size)
        with profiler.phase("small"):
            pass
    large, small = measured(profiler, "large"), measured(profiler, "small")
    for phase in (large, small):
        assert phase.resident_peak is not None
        assert phase.resident_start is not None
        assert phase.resident_end is not None
    assert 62 * MIB <= large.resident_peak - large.resident_start <= 72 * MIB
    assert large.resident_end - large.resident_start < 8 * MIB
    assert small.resident_peak - small.resident_start < 8 * MIB


@needs_peak_reset
def test_an_outer_phase_sees_the_peaks_before_in_and_after_inner_ones() -> None:
    for before, within, after in ((64, 1, 1), (1, 64, 1), (1, 1, 64)):
        with MemoryProfiler(trace=False) as outer, outer.phase("outer"):
            touched(before * MIB)
            with MemoryProfiler(trace=False) as inner, inner.phase("inner"):
                touched(within * MIB)
            touched(after * MIB)
        whole, part = measured(outer, "outer"), measured(inner, "inner")
        assert 62 * MIB <= whole.resident_peak - whole.resident_start <= 72 * MIB
        assert (part.resident_peak - part.resident_start > 62 * MIB) == (within == 64)


def test_where_the_peak_cannot_be_reset_it_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(counters, "CLEAR_REFS_FILE", str(tmp_path / "nothing" / "clear_refs"))
    with MemoryProfiler(trace=False) as profiler, profiler.phase("load"):
        pass
    assert measured(profiler, "load").resident_peak is None
    legend = "- is not measured; this system counts no peaks of resident memory over a phase\n"
    assert render(profiler.report()).endswith(legend)


def test_simulated_without_proc_resident_bytes_are_those_of_psutil(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(counters, "STATUS_FILE", str(tmp_path / "status"))
    for status in (None, "Name:\tpython\n"):
        if status is not None:
            (tmp_path / "status").write_text(status, encoding="ascii")
        assert abs((resident_bytes() or 0) - psutil.Process().memory_info().rss) < 64 * MIB
        assert resident_bytes("VmHWM") is None and resident_bytes("RssAnon") is None
    windows = SimpleNamespace(rss=3, peak_wset=5)
    monkeypatch.setattr(counters.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: windows))
    assert (resident_bytes(), counters.peak_bytes(torch.device("cpu"))) == (3, 5)


class Device(SimpleNamespace):
    """Counts like torch.cuda: a reset sets the peak to the bytes allocated now."""

    allocated, peak, started = 0, 0, False

    def is_initialized(self) -> bool:
        return self.started

    def use(self, size: int) -> None:
        self.started = True
        self.peak = max(self.peak, self.allocated + size)

    def max_memory_allocated(self) -> int:
        assert self.started
        return self.peak

    def max_memory_reserved(self) -> int:
        return self.max_memory_allocated() + 2

    def reset_peak_memory_stats(self) -> None:
        assert self.started
        self.peak = self.allocated

    def synchronize(self) -> None:
        assert self.started

    def memory_reserved(self) -> int:
        return self.allocated + 2

    def mem_get_info(self) -> tuple[int, int]:
        assert self.started
        return 600, 1000


def test_memory_outside_of_the_allocator_is_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device()
    monkeypatch.setattr(counters, "_accelerator", lambda: device)
    with MemoryProfiler(trace=False) as profiler:
        assert profiler.report().context_bytes is None  # asking would start it
        device.use(100)
        assert profiler.report().context_bytes == 1000 - 600 - 2
    monkeypatch.setattr(counters, "_accelerator", lambda: None)
    assert profiler.report().context_bytes is None


def test_an_accelerators_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(counters, "_accelerator", lambda: device)
    with MemoryProfiler(trace=False) as profiler, profiler.phase("outer"):
        with profiler.phase("idle"):
            pass
        device.use(100)
        for size in (70, 30):
            with profiler.phase("step"):
                device.use(size)
    peaks = {p.name: (p.allocated_peak, p.reserved_peak) for p in profiler.report().phases}
    assert peaks == {"outer": (100, 102), "idle": (0, 0), "step": (70, 72)}


def test_without_an_accelerator_that_counts_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert counters._accelerator() is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert counters._accelerator() is None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert counters._accelerator() is torch.cuda
