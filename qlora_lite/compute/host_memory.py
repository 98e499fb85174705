"""Returns freed heap pages to the operating system between blocks during CPU training, and keeps them in between.

glibc's malloc returns every block above 128 KiB (up to 32 MiB, as it adapts) to the kernel when it is freed, and gets
zeroed pages for the next one. Unpacking a weight and freeing it again, hundreds of times a step, then spends more time
in page faults than in arithmetic. `set_host_limits` sets two limits (mallopt(3)) that let malloc reuse the pages.

Memory that is reused in one order is fragmented for another: temporaries of many sizes next to tensors that stay,
backward after forward, and batches of other lengths touch ever more of the heap, up to several times the live memory.
`HeapTrimmer` therefore returns all free pages (malloc_trim(3)) when the process has grown by a fraction of its size
and, where memory counts more than time, between forward and backward. A page that is needed again costs a page fault:
with the small fraction about 2 % of a step that recomputes, and 9 % of a step that keeps all activations.

oneDNN, which multiplies 16-bit matrices for torch on a CPU, compiles a program of about 650 KiB for each shape of a
product and keeps the last 1,024: with batches of many lengths these take twice the memory that training needs. A step
has about thirty shapes. Compiling a program again takes a millisecond.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psutil
import torch
from torch import Tensor, nn

from qlora_lite.compute.devices import on_cpu
from qlora_lite.patches import patched_forward
from qlora_lite.surgery import repeated_blocks
from qlora_lite.system import c_function

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
# glibc refuses a larger one.
LARGEST_MMAP_THRESHOLD = 32 << 20
# malloc returns free memory at the top of the heap beyond this.
KEPT_BYTES = 256 << 20
# The fraction of its size that the process may grow by, and at least MIN_GROWTH, before free pages are returned.
# 1/16 trims between any two blocks of a large model, which takes a fifth of the time; 1/4 saves less memory.
TRIM_OFTEN, TRIM_RARELY = 1 / 7, 1.0
MIN_GROWTH = 48 << 20
# Environment variables that limit oneDNN's own cache of programs (its documentation, "Primitive Cache") and that of
# torch's layer above it (ideep); either cache keeps programs that the other one dropped. Older names come last.
PROGRAM_CACHES = (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"), ("LRU_CACHE_CAPACITY",))
# With fewer than a step needs, each layer would compile all of its programs again.
KEPT_PROGRAMS = 96


@functools.cache
def set_host_limits() -> bool:
    """Sets the limits of oneDNN and malloc for this process, once. Returns whether malloc's were set (glibc only).

    oneDNN reads its environment variables at the first product of a process, so this has to come before. Variables that
    the user has set are kept.
    """
    for names in PROGRAM_CACHES:
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = str(KEPT_PROGRAMS)
    mallopt = c_function("mallopt")
    if mallopt is None:
        return False
    kept = mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    return bool(kept and mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD))


def release_freed_pages() -> bool:
    """Returns freed memory that malloc keeps to the kernel. Returns whether there was any (glibc only)."""
    trim = _malloc_trim()
    return trim is not None and bool(trim(0))


class HeapTrimmer:
    """Returns freed pages each time the process has grown by a fraction of the smallest size that it had.

    fraction: TRIM_OFTEN to save memory, TRIM_RARELY to save time.
    """

    def __init__(self, fraction: float = TRIM_OFTEN) -> None:
        self._process, self._fraction = psutil.Process(), fraction
        self._smallest = self._resident()

    def _resident(self) -> int:
        now = self._process.memory_info()
        return int(now.rss - getattr(now, "shared", 0))  # mapped pages of files are no heap

    def end_phase(self) -> None:
        """Trims between forward and backward, which allocate in different orders; with TRIM_RARELY does nothing."""
        if self._fraction <= TRIM_OFTEN:
            release_freed_pages()

    def check(self) -> bool:
        """Trims if the process has grown. Returns whether it did. Reading the size takes about 10 microseconds."""
        resident = self._resident()
        grown = resident - self._smallest > max(MIN_GROWTH, self._smallest * self._fraction)
        if grown:
            release_freed_pages()
            self._smallest = self._resident()
        else:
            self._smallest = min(self._smallest, resident)
        return grown


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return c_function("malloc_trim")


def _with_checks(trimmer: HeapTrimmer, forward: Callable[..., object], *args: object, **kwargs: object) -> object:
    """Runs the forward of a block; checks the process before it, and before the backward of the block."""
    trimmer.check()
    result = forward(*args, **kwargs)
    for value in result if isinstance(result, tuple) else (result,):
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(lambda grad: (trimmer.check(), None)[1])
            break
    return result


@contextmanager
def heap_trimming(model: nn.Module, device: torch.device, checkpointing: str | int) -> Iterator[HeapTrimmer]:
    """Checks a `HeapTrimmer` before the forward and the backward of each repeated block, within the `with` block.

    checkpointing: as in TrainConfig; with "none" memory is spent to save time, so the heap is trimmed rarely. Modules
    on an accelerator, whose memory is not the process's, are left alone.
    """
    trimmer = HeapTrimmer(TRIM_RARELY if checkpointing == "none" else TRIM_OFTEN)
    with ExitStack() as stack:
        for block in repeated_blocks(model) if on_cpu(device) else []:
            forward = functools.partial(_with_checks, trimmer, block.forward)
            stack.enter_context(patched_forward(block, forward))
        yield trimmer
