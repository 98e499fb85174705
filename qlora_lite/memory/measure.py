"""Observes a run phase by phase: seconds, the process's peak, the accelerator's peak, and every tensor at the peak.

The process and the accelerator have one peak counter each, which is reset when a phase starts. Whoever resets it
first reads it on behalf of all phases that are open, so phases and profilers may nest. The resident peak is Linux's
VmHWM, which writing "5" to /proc/self/clear_refs resets; where that is not allowed it is not measured.

Peaks of an outer phase include those of the phases inside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, final

import torch
from torch import nn

from qlora_lite.errors import ConfigError
from qlora_lite.memory.ownership import Ownership
from qlora_lite.memory.report import MemoryReport, PhaseMemory
from qlora_lite.memory.timeline import thinned
from qlora_lite.memory.trace import StorageTrace

STATUS_FILE = "/proc/self/status"
CLEAR_REFS_FILE = "/proc/self/clear_refs"
RESET_PEAK = "5"


def resident_bytes(field_name: str = "VmRSS") -> int | None:
    """A size from /proc/self/status: `VmRSS` now, `VmHWM` its peak since the last reset; None where there is none."""
    try:
        with open(STATUS_FILE, encoding="ascii") as status:
            for line in status:
                if line.startswith(field_name + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def reset_resident_peak() -> bool:
    """Lets `VmHWM` start anew from what is resident now; whether that was allowed."""
    try:
        with open(CLEAR_REFS_FILE, "w", encoding="ascii") as clear_refs:
            clear_refs.write(RESET_PEAK)
    except OSError:
        return False
    return True


def _accelerator() -> Any | None:
    """The torch module of the current accelerator if it counts its peaks (torch.cuda, torch.xpu), else None."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    module = None if device is None else torch.get_device_module(device.type)
    return module if hasattr(module, "max_memory_allocated") else None


def context_bytes() -> int | None:
    """What is taken of the accelerator's memory beside this process's allocator: its context, and other processes.

    None where the device does not say, or nothing has used it yet.
    """
    device = _accelerator()
    if device is None or not hasattr(device, "mem_get_info") or not device.is_initialized():
        return None
    free, total = device.mem_get_info()
    return int(total - free - device.memory_reserved())


def _larger(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)


@dataclass(eq=False)
class _Peaks:
    """The largest values seen of the three counters; None from the first time that one could not be read."""

    resident: int | None = 0
    allocated: int | None = 0
    reserved: int | None = 0

    def raise_to(self, other: _Peaks) -> None:
        self.resident = _larger(self.resident, other.resident)
        self.allocated = _larger(self.allocated, other.allocated)
        self.reserved = _larger(self.reserved, other.reserved)


def _peaks_since_reset() -> _Peaks:
    device = _accelerator()
    if device is None:
        return _Peaks(resident_bytes("VmHWM"), None, None)
    # Asking an accelerator that nothing has used yet would start it, or raise.
    used = device.is_initialized()
    allocated, reserved = (device.max_memory_allocated(), device.max_memory_reserved()) if used else (0, 0)
    return _Peaks(resident_bytes("VmHWM"), allocated, reserved)


# The counters belong to the process, so this list does too: one entry for each open phase of any profiler.
_open_peaks: list[_Peaks] = []


def _raise_open_peaks() -> None:
    now = _peaks_since_reset()
    for peaks in _open_peaks:
        peaks.raise_to(now)


@contextmanager
def _watching_peaks(peaks: _Peaks) -> Iterator[None]:
    """Resets the counters, and raises `peaks` to what they reach inside."""
    _raise_open_peaks()
    if not reset_resident_peak():
        peaks.resident = None
    device = _accelerator()
    if device is not None and device.is_initialized():
        device.reset_peak_memory_stats()
    _open_peaks.append(peaks)
    try:
        yield
    finally:
        _raise_open_peaks()
        _open_peaks.remove(peaks)


@dataclass
class _PhaseTotals:
    entries: int = 0
    seconds: float = 0.0
    resident_start: int | None = None
    resident_end: int | None = None
    peaks: _Peaks = field(default_factory=_Peaks)


@contextmanager
def _counted(totals: _PhaseTotals) -> Iterator[None]:
    """Adds what the block took."""
    if not totals.entries:
        totals.resident_start = resident_bytes()
    with _watching_peaks(totals.peaks):
        start = time.perf_counter()
        try:
            yield
        finally:
            _wait_for_accelerator()
            totals.seconds += time.perf_counter() - start
            totals.resident_end = resident_bytes()


@final
class MemoryProfiler:
    """Measures what happens inside `with profiler:`, in the phases named by `with profiler.phase("forward"):`.

    trace: follow every tensor storage too, and split the peak of each phase by category and module. It slows small
        models down severalfold; without it, a phase costs two readings of counters and nothing is hooked.

    model, optimizer: told here, or later by `track`, they give the tensors their category (ownership.py). Both are
    referenced weakly. Hooks are removed on leaving. Entering a second time starts anew.
    new_trace, counters: for a rehearsal, which follows storages in its own way and has nothing to count.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Any | None = None,
        trace: bool = True,
        *,
        new_trace: Callable[[], StorageTrace] = StorageTrace,
        counters: bool = True,
    ) -> None:
        self._new_trace = new_trace if trace else None
        self._counters = counters
        self._phases: dict[str, _PhaseTotals] = {}
        self._trace: StorageTrace | None = None
        self._ownership = Ownership()
        self._is_open = False
        self.track(model=model, optimizer=optimizer)

    def __enter__(self) -> MemoryProfiler:
        if self._is_open:
            raise ConfigError("this MemoryProfiler is already open; leave it first, or use a second one")
        self._phases = {}
        self._trace = None if self._new_trace is None else self._new_trace()
        self._is_open = True
        self._label()
        if self._trace is not None:
            self._trace.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self._label()
        finally:
            self._is_open = False
            self._ownership.let_go()
            if self._trace is not None:
                self._trace.__exit__(kind, error, where)

    @property
    def trace(self) -> StorageTrace | None:
        """The storages followed in the last or current run; None if none were."""
        return self._trace

    def track(self, model: nn.Module | None = None, optimizer: Any | None = None) -> None:
        """Says which model and optimizer the tensors belong to; what is not given stays as it was."""
        self._ownership.track(model, optimizer)
        self._label()

    def _label(self) -> None:
        """Modules, gradients and states come and go within a phase."""
        if self._trace is not None and self._is_open:
            self._ownership.label(self._trace)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures what happens inside under this name; a name may be entered many times."""
        if not self._is_open:
            raise ConfigError(f"phase {name!r} was entered outside of its profiler; use it inside `with profiler:`")
        totals = self._phases.setdefault(name, _PhaseTotals())
        nothing = nullcontext()
        with nothing if self._trace is None else self._trace.phase(name):
            try:
                with _counted(totals) if self._counters else nothing:
                    yield
            finally:
                totals.entries += 1
                self._label()

    def report(self) -> MemoryReport:
        """What was measured in the phases that were left so far; of a phase entered often, the largest peaks."""
        phases = tuple(self._phase_memory(name, totals) for name, totals in self._phases.items() if totals.entries)
        return MemoryReport(
            phases,
            timeline=None if self._trace is None else thinned(self._trace.timeline()),
            context_bytes=context_bytes() if self._counters else None,
        )

    def _phase_memory(self, name: str, totals: _PhaseTotals) -> PhaseMemory:
        live_peak, breakdown = (None, None) if self._trace is None else self._trace.peak(name)
        return PhaseMemory(
            name=name,
            entries=totals.entries,
            seconds=totals.seconds if self._counters else None,
            resident_start=totals.resident_start,
            resident_end=totals.resident_end,
            resident_peak=totals.peaks.resident if self._counters else None,
            allocated_peak=totals.peaks.allocated if self._counters else None,
            reserved_peak=totals.peaks.reserved if self._counters else None,
            live_peak=live_peak,
            breakdown=breakdown,
            peak_in=None if self._trace is None else self._trace.peak_in(name),
        )


def _wait_for_accelerator() -> None:
    # What was only queued is not done, and its seconds would be counted in a later phase.
    device = _accelerator()
    if device is not None and device.is_initialized():
        device.synchronize()


def peak_bytes(device: torch.device) -> int | None:
    """The most that was in use so far: allocated on an accelerator, resident on a CPU; None where nothing counts it.

    It starts anew when a profiler's phase does.
    """
    if device.type == "cpu":
        return resident_bytes("VmHWM")
    counter = _accelerator()
    return None if counter is None else int(counter.max_memory_allocated(device))
