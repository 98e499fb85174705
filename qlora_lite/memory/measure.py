"""Observes a run phase by phase: seconds, the process's peak, the accelerator's peak, and every tensor at the peak.

The process and the accelerator have one peak counter each, which is reset when a phase starts. Whoever resets it
first reads it on behalf of all phases that are open, so phases and profilers may nest. The resident peak is Linux's
VmHWM, which writing "5" to /proc/self/clear_refs resets; where that is not allowed it is not measured.

Peaks of an outer phase include those of the phases inside it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.report import MemoryReport, PhaseMemory
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.quantize import PackedWeight

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


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an optimizer's state of one parameter, which may be nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


@final
class MemoryProfiler:
    """Measures what happens inside `with profiler:`, in the phases named by `with profiler.phase("forward"):`.

    trace: follow every tensor storage too, and split the peak of each phase by category and module. It slows small
        models down severalfold; without it, a phase costs two readings of counters and nothing is hooked.

    model, optimizer: told here, or later by `track`, they give the tensors their category. What is trained is
    ADAPTER, its gradients and optimizer states GRADIENT and OPTIMIZER_STATE, statistics of packed weights
    QUANT_STATE, all else in the model BASE_WEIGHT. Both are referenced weakly. Hooks are removed on leaving.
    Entering a second time starts anew.
    """

    def __init__(self, model: nn.Module | None = None, optimizer: Any | None = None, trace: bool = True) -> None:
        self._wants_trace = trace
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._optimizer: Callable[[], Any | None] = lambda: None
        self._phases: dict[str, _PhaseTotals] = {}
        self._trace: StorageTrace | None = None
        self._gradient_hooks = WeakIdKeyDictionary()
        self._is_open = False
        self.track(model=model, optimizer=optimizer)

    def __enter__(self) -> MemoryProfiler:
        if self._is_open:
            raise ConfigError("this MemoryProfiler is already open; leave it first, or use a second one")
        self._phases = {}
        self._trace = StorageTrace() if self._wants_trace else None
        self._is_open = True
        self._label_all()
        if self._trace is not None:
            self._trace.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self._label_all()
        finally:
            self._is_open = False
            for hook in self._gradient_hooks.values():
                hook.remove()
            self._gradient_hooks.clear()
            if self._trace is not None:
                self._trace.__exit__(kind, error, where)

    @property
    def trace(self) -> StorageTrace | None:
        """The storages followed in the last or current run; None if none were."""
        return self._trace

    def track(self, model: nn.Module | None = None, optimizer: Any | None = None) -> None:
        """Says which model and optimizer the tensors belong to; what is not given stays as it was."""
        if model is not None:
            self._model = weakref.ref(model)
        if optimizer is not None:
            self._optimizer = weakref.ref(optimizer)
        self._label_all()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures what happens inside under this name; a name may be entered many times."""
        if not self._is_open:
            raise ConfigError(f"phase {name!r} was entered outside of its profiler; use it inside `with profiler:`")
        totals = self._phases.setdefault(name, _PhaseTotals())
        traced: AbstractContextManager[None] = nullcontext() if self._trace is None else self._trace.phase(name)
        if not totals.entries:
            totals.resident_start = resident_bytes()
        with traced, _watching_peaks(totals.peaks):
            start = time.perf_counter()
            try:
                yield
            finally:
                _wait_for_accelerator()
                totals.seconds += time.perf_counter() - start
                totals.entries += 1
                totals.resident_end = resident_bytes()
                self._label_all()

    def report(self) -> MemoryReport:
        """What was measured in the phases that were left so far; of a phase entered often, the largest peaks."""
        return MemoryReport(tuple(self._phase_memory(name, t) for name, t in self._phases.items() if t.entries))

    def _phase_memory(self, name: str, totals: _PhaseTotals) -> PhaseMemory:
        live_peak, breakdown = (None, None) if self._trace is None else self._trace.peak(name)
        return PhaseMemory(
            name=name,
            entries=totals.entries,
            seconds=totals.seconds,
            resident_start=totals.resident_start,
            resident_end=totals.resident_end,
            resident_peak=totals.peaks.resident,
            allocated_peak=totals.peaks.allocated,
            reserved_peak=totals.peaks.reserved,
            live_peak=live_peak,
            breakdown=breakdown,
            peak_in=None if self._trace is None else self._trace.peak_in(name),
        )

    def _label_all(self) -> None:
        """Labels what model and optimizer hold by now; modules, gradients and states come and go within a phase."""
        if self._trace is None or not self._is_open:
            return
        model, optimizer = self._model(), self._optimizer()
        owners: dict[int, str] = {}
        if model is not None:
            self._trace.follow(model)
            for name, module in model.named_modules():
                self._label_module(self._trace, name, module, owners)
        if optimizer is not None:
            for parameter, state in optimizer.state.items():
                for tensor in _tensors_in(state):
                    self._trace.label(tensor, Category.OPTIMIZER_STATE, owners.get(id(parameter)))

    def _label_module(self, trace: StorageTrace, name: str, module: nn.Module, owners: dict[int, str]) -> None:
        """Labels what a module holds itself. The statistics of a packed weight go to the layer that it belongs to."""
        packed = isinstance(module, PackedWeight)
        owner = name.rpartition(".")[0] if packed else name
        for key, buffer in module.named_buffers(recurse=False):
            statistics = packed and key != "packed"
            trace.label(buffer, Category.QUANT_STATE if statistics else Category.BASE_WEIGHT, owner)
        for _, parameter in module.named_parameters(recurse=False):
            # A tied parameter is met again under its other names.
            if id(parameter) in owners:
                continue
            owners[id(parameter)] = owner
            trace.label(parameter, Category.ADAPTER if parameter.requires_grad else Category.BASE_WEIGHT, owner)
            self._label_gradient(trace, parameter, owner)
            if parameter.requires_grad and parameter not in self._gradient_hooks:
                self._gradient_hooks[parameter] = self._hook_gradient(trace, parameter, owner)

    def _hook_gradient(self, trace: StorageTrace, parameter: Tensor, owner: str) -> Any:
        # Without it, a gradient that is freed within the phase that made it would never be recognized.
        return parameter.register_post_accumulate_grad_hook(lambda made: self._label_gradient(trace, made, owner))

    def _label_gradient(self, trace: StorageTrace, parameter: Tensor, owner: str) -> None:
        if parameter.grad is not None:
            trace.label(parameter.grad, Category.GRADIENT, owner)


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
