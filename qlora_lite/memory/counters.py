"""Reads the memory counters of the process and of the accelerator, and their peaks over a block of code.

The process and the accelerator have one peak counter each, and resetting it resets it for everybody. `watch_peaks`
therefore reads the counters on behalf of every block that is open before it resets them, so blocks may nest and
profilers may overlap. The peak of an outer block includes those of the blocks inside it.

The resident peak of the process is Linux's VmHWM, which writing "5" to /proc/self/clear_refs resets (proc(5)). Where
that is not possible, the peak over a block is unknown. Resident bytes come from psutil then, and on Windows so does the
peak of the whole process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch

from qlora_lite.system import CLEAR_REFS_FILE

STATUS_FILE = "/proc/self/status"
# Where psutil has the sizes, by their names in that file. Only Windows has the second one.
PSUTIL_FIELDS = {"VmRSS": "rss", "VmHWM": "peak_wset"}
RESET_PEAK = "5"


class AcceleratorModule(Protocol):
    """The memory functions of a torch module such as torch.cuda or torch.xpu; all sizes in bytes."""

    def is_initialized(self) -> bool: ...
    def synchronize(self) -> None: ...
    def max_memory_allocated(self, device: torch.device | None = None) -> int: ...
    def max_memory_reserved(self) -> int: ...
    def memory_reserved(self) -> int: ...
    def reset_peak_memory_stats(self) -> None: ...
    def mem_get_info(self) -> tuple[int, int]:
        """(free, total) of the device. Not every such module has this function."""


def _accelerator() -> AcceleratorModule | None:
    """The torch module of the current accelerator if it counts its peaks, else None."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    module: AcceleratorModule | None = None if device is None else torch.get_device_module(device.type)
    return module if hasattr(module, "max_memory_allocated") else None


def _used_accelerator() -> AcceleratorModule | None:
    """The accelerator's module once something has used it. Asking before that would initialize it, or raise."""
    module = _accelerator()
    return module if module is not None and module.is_initialized() else None


def resident_bytes(field_name: str = "VmRSS") -> int | None:
    """Returns a size of this process in bytes: `VmRSS` is resident now, `VmHWM` its peak since the last reset.

    Other names are those of /proc/self/status. Returns None where the system does not tell the size.
    """
    try:
        with open(STATUS_FILE, encoding="ascii") as status:
            for line in status:
                if line.startswith(field_name + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    size: int | None = getattr(psutil.Process().memory_info(), PSUTIL_FIELDS.get(field_name, ""), None)
    return size


def reset_resident_peak() -> bool:
    """Sets `VmHWM` to the bytes resident now. Returns False where the system does not allow it."""
    try:
        with open(CLEAR_REFS_FILE, "w", encoding="ascii") as clear_refs:
            clear_refs.write(RESET_PEAK)
    except OSError:
        return False
    return True


def context_bytes() -> int | None:
    """Returns the bytes of accelerator memory taken outside this process's allocator: its context, other processes.

    Returns None where the device cannot report it, or nothing has used the device yet.
    """
    device = _used_accelerator()
    if device is None or not hasattr(device, "mem_get_info"):
        return None
    free, total = device.mem_get_info()
    return int(total - free - device.memory_reserved())


def free_bytes() -> int:
    """Returns the free bytes of the accelerator, which is initialized by that, or else of the machine."""
    device = _accelerator()
    if device is None or not hasattr(device, "mem_get_info"):
        return int(psutil.virtual_memory().available)
    return device.mem_get_info()[0]


def peak_bytes(device: torch.device) -> int | None:
    """Returns the peak since the last reset: allocated bytes on an accelerator, resident bytes of the process on a CPU.

    Returns None where nothing counts it. Every phase of a profiler resets it.
    """
    if device.type == "cpu":
        return resident_bytes("VmHWM")
    counter = _accelerator()
    return None if counter is None else int(counter.max_memory_allocated(device))


def wait_for_accelerator() -> None:
    """Waits for the work queued on the accelerator, so that its time counts in the phase that queued it."""
    device = _used_accelerator()
    if device is not None:
        device.synchronize()


def _larger(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)


@dataclass(eq=False)
class Peaks:
    """The largest values seen of the three counters, in bytes; None from the first time that one could not be read."""

    resident: int | None = 0
    allocated: int | None = 0
    reserved: int | None = 0

    def raise_to(self, other: Peaks) -> None:
        self.resident = _larger(self.resident, other.resident)
        self.allocated = _larger(self.allocated, other.allocated)
        self.reserved = _larger(self.reserved, other.reserved)


def _peaks_since_reset() -> Peaks:
    resident = resident_bytes("VmHWM")
    if _accelerator() is None:
        return Peaks(resident, None, None)
    device = _used_accelerator()
    if device is None:
        return Peaks(resident, 0, 0)
    return Peaks(resident, device.max_memory_allocated(), device.max_memory_reserved())


# The counters belong to the process, and so does this list: one entry for each open block of any profiler.
_open_peaks: list[Peaks] = []


def _raise_open_peaks() -> None:
    now = _peaks_since_reset()
    for peaks in _open_peaks:
        peaks.raise_to(now)


@contextmanager
def watch_peaks(peaks: Peaks) -> Iterator[None]:
    """Resets the counters and raises `peaks` to the values that they reach within the block."""
    _raise_open_peaks()
    if not reset_resident_peak():
        peaks.resident = None
    device = _used_accelerator()
    if device is not None:
        device.reset_peak_memory_stats()
    _open_peaks.append(peaks)
    try:
        yield
    finally:
        _raise_open_peaks()
        _open_peaks.remove(peaks)
