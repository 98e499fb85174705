"""Measured memory: bytes by category and module, traced through a step, and reported by phase.

In reading order:

breakdown        Category and MemoryBreakdown
module_tracker   which module is running, in forward and in backward
storages         the tensors in nested values, and the storages of a tensor
trace            StorageTrace: follows every storage through a step, real or fake
tensor_labels    the category of each tensor of a model and an optimizer
timeline         a trace downsampled to the points that a picture can show
report           MemoryReport: the memory of each phase, and its text
comparison       predicted and measured sizes side by side
counters         counters of the process and the accelerator
profiler         MemoryProfiler
snapshot         torch's record of an accelerator's allocations

drawing/ draws a report as an HTML page and as pictures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.memory.breakdown import Category as Category
    from qlora_lite.memory.breakdown import MemoryBreakdown as MemoryBreakdown
    from qlora_lite.memory.comparison import compare as compare
    from qlora_lite.memory.comparison import render_comparison as render_comparison
    from qlora_lite.memory.profiler import MemoryProfiler as MemoryProfiler
    from qlora_lite.memory.report import MemoryReport as MemoryReport
    from qlora_lite.memory.report import PhaseMemory as PhaseMemory
    from qlora_lite.memory.report import readable_bytes as readable_bytes
    from qlora_lite.memory.report import render as render
    from qlora_lite.memory.snapshot import memory_snapshot as memory_snapshot
    from qlora_lite.memory.trace import StorageTrace as StorageTrace

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "profiler": "MemoryProfiler",
        "report": "MemoryReport PhaseMemory readable_bytes render",
        "breakdown": "Category MemoryBreakdown",
        "comparison": "compare render_comparison",
        "trace": "StorageTrace",
        "snapshot": "memory_snapshot",
    },
)
