"""`MemoryProfiler`: measures a run phase by phase.

Of each phase it records the seconds, the peaks of the process and of the accelerator (counters.py), and, if it traces,
every tensor storage that was alive at the peak (trace.py), by category and module (tensor_labels.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import final

from torch import nn
from torch.optim import Optimizer

from qlora_lite.checks import is_count, require
from qlora_lite.errors import ConfigError
from qlora_lite.memory.counters import Peaks, context_bytes, resident_bytes, wait_for_accelerator, watch_peaks
from qlora_lite.memory.report import MemoryReport, PhaseMemory
from qlora_lite.memory.tensor_labels import TensorLabeler
from qlora_lite.memory.timeline import downsample
from qlora_lite.memory.trace import StorageTrace


@dataclass
class _PhaseTotals:
    """The counters of a phase over all times that it was entered."""

    entries: int = 0
    traced: int = 0
    seconds: float = 0.0
    resident_start: int | None = None
    resident_end: int | None = None
    peaks: Peaks = field(default_factory=Peaks)


@contextmanager
def _counted(totals: _PhaseTotals) -> Iterator[None]:
    """Adds the time and the peaks of the block to `totals`."""
    if not totals.entries:
        totals.resident_start = resident_bytes()
    with watch_peaks(totals.peaks):
        start = time.perf_counter()
        try:
            yield
        finally:
            wait_for_accelerator()
            totals.seconds += time.perf_counter() - start
            totals.resident_end = resident_bytes()


@final
class MemoryProfiler:
    """Measures what runs inside `with profiler:`, in phases named by `with profiler.phase("forward"):`.

    Args:
        model, optimizer: give tensors their category; may be set later by `track`. Both are referenced weakly.
        trace: also follow every tensor storage, and split the peak of each phase by category and module. Tracing slows
            small models down severalfold. Without it a phase costs two readings of counters, and nothing is hooked.
        traced_entries: trace a phase only the first so many times that it is entered; later ones are counted, at full
            speed. The steps of a run allocate much the same. None traces all of them.
        new_trace: makes the trace of each run; a rehearsal passes one that adds an accelerator's workspaces.
        counters: read clocks and counters; a rehearsal, which computes nothing, passes False.

    Hooks are removed on leaving. Entering again starts a new measurement.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        trace: bool = True,
        *,
        traced_entries: int | None = None,
        new_trace: Callable[[], StorageTrace] = StorageTrace,
        counters: bool = True,
    ) -> None:
        wanted = "traced_entries must be None or an integer of at least 1"
        require(traced_entries is None or is_count(traced_entries, 1), wanted, traced_entries)
        self._new_trace = new_trace if trace else None
        self._traced_entries = traced_entries
        self._counters = counters
        self._phases: dict[str, _PhaseTotals] = {}
        self._trace: StorageTrace | None = None
        self._labeler = TensorLabeler()
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
            self._labeler.remove_hooks()
            if self._trace is not None:
                self._trace.__exit__(kind, error, where)

    @property
    def trace(self) -> StorageTrace | None:
        """The trace of the current or last run; None without tracing."""
        return self._trace

    def track(self, model: nn.Module | None = None, optimizer: Optimizer | None = None) -> None:
        """Sets the model and the optimizer whose tensors are labelled; None leaves the previous one."""
        self._labeler.track(model, optimizer)
        self._label()

    def _label(self) -> None:
        # Called at both ends of every phase, since modules, gradients and states come and go within one.
        if self._trace is not None and self._is_open:
            self._labeler.label(self._trace)

    @contextmanager
    def phase(self, name: str, *, trace: bool = True) -> Iterator[None]:
        """Measures the block under this name, which may be entered many times.

        trace: False only reads the counters, of the phases inside it too.
        Raises ConfigError outside of `with profiler:`.
        """
        if not self._is_open:
            raise ConfigError(f"phase {name!r} was entered outside of its profiler; use it inside `with profiler:`")
        totals = self._phases.setdefault(name, _PhaseTotals())
        traces = trace and (self._traced_entries is None or totals.traced < self._traced_entries)
        with self._traced(totals, name) if traces else self._untraced():
            try:
                with _counted(totals) if self._counters else nullcontext():
                    yield
            finally:
                totals.entries += 1

    @contextmanager
    def _traced(self, totals: _PhaseTotals, name: str) -> Iterator[None]:
        if self._trace is None or self._trace.is_paused:
            yield
            return
        totals.traced += 1
        with self._trace.phase(name):
            try:
                yield
            finally:
                self._label()

    def _untraced(self) -> AbstractContextManager[None]:
        return nullcontext() if self._trace is None or self._trace.is_paused else self._trace.paused()

    def report(self) -> MemoryReport:
        """Returns the measurements of the phases that were left so far; of a repeated phase, the largest peaks."""
        phases = tuple(self._phase_memory(name, totals) for name, totals in self._phases.items() if totals.entries)
        return MemoryReport(
            phases,
            timeline=None if self._trace is None else downsample(self._trace.timeline()),
            context_bytes=context_bytes() if self._counters else None,
        )

    def _phase_memory(self, name: str, totals: _PhaseTotals) -> PhaseMemory:
        trace = self._trace if totals.traced else None
        live_peak, breakdown = (None, None) if trace is None else trace.peak(name)
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
            peak_in=None if trace is None else trace.peak_in(name),
            traced_entries=None if trace is None else totals.traced,
        )
