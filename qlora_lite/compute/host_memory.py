"""Keeps freed pages of host memory in the process while it works, and hands them back between its phases.

glibc's malloc hands every block above 128 KiB (at most 32 MiB, as it learns) back to the kernel when it is freed, and
gets zeroed pages for the next one. Unpacking a weight and dropping it again, hundreds of times a step, then spends
more time in page faults than in arithmetic. The two limits below (mallopt(3)) let malloc reuse the pages instead.

What is reused in one order is full of holes for another: temporaries of many sizes beside tensors that stay, backward
after forward, batches of other lengths would touch ever more of the heap, up to several times what lives. So the pages
of all holes go back whenever the process has grown by a part of itself (`HoleLimit`), and, where memory counts more
than time, between forward and backward (malloc_trim(3)). A page that is wanted again costs a page fault: with the
small part some 2 % of a step that recomputes, and 9 % of one that keeps all.

oneDNN, which multiplies matrices of 16 bits for torch on a CPU, makes a program for each shape of a product, of some
650 KiB, and keeps the last 1,024: with batches of many lengths they grow to twice what training needs. A model's step
has some thirty shapes; what is made again when a length comes back takes a millisecond each.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from qlora_lite.compute.devices import on_cpu
from qlora_lite.patches import patched_forward
from qlora_lite.surgery import repeated_blocks

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
# glibc refuses a larger one.
LARGEST_MMAP_THRESHOLD = 32 << 20
# Free memory at the top of the heap beyond this goes back to the kernel.
KEPT_BYTES = 256 << 20
# The process may grow by this part of what it was, and by LEAST_GROWTH in any case, before holes go back.
# 1/16 trims between any two blocks of a large model (a fifth of the time), 1/4 saves less.
TIGHT, LOOSE = 1 / 7, 1.0
LEAST_GROWTH = 48 << 20
# oneDNN's own cache of programs (its documentation, "Primitive Cache"), and that of torch's layer above it (ideep),
# each of which holds on to what the other lets go: the names that the limit of each goes by, the older ones last.
PROGRAM_CACHES = (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"), ("LRU_CACHE_CAPACITY",))
# Fewer than a step needs would all be made again in each layer.
KEPT_PROGRAMS = 96


@functools.cache
def set_host_limits() -> bool:
    """Sets oneDNN's and malloc's limits for this process, once; whether malloc's could be set (glibc only).

    oneDNN's are variables of the environment that are read at a process's first product, and count if this comes
    before that; what a user has set stays.
    """
    for names in PROGRAM_CACHES:
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = str(KEPT_PROGRAMS)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    kept = mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    return bool(kept and mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD))


def release_freed_pages() -> bool:
    """Hands what malloc keeps of freed memory back to the kernel; whether there was any (glibc only)."""
    trim = _malloc_trim()
    return trim is not None and bool(trim(0))


class HoleLimit:
    """Hands freed pages back each time the process has grown by a part, TIGHT or LOOSE, of its smallest size.

    Tight is for who counts bytes, loose for who counts seconds.
    """

    def __init__(self, part: float = TIGHT) -> None:
        self._process, self._part = psutil.Process(), part
        self._smallest = self._resident()

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)

    def phase_ends(self) -> None:
        """The next phase will ask for memory in another order: a tight limit hands everything back."""
        if self._part <= TIGHT:
            release_freed_pages()

    def check(self) -> bool:
        """Asks for the size of the process, which takes some 10 microseconds; whether pages went back."""
        resident = self._resident()
        grown = resident - self._smallest > max(LEAST_GROWTH, self._smallest * self._part)
        if grown:
            release_freed_pages()
            self._smallest = self._resident()
        else:
            self._smallest = min(self._smallest, resident)
        return grown


@functools.cache
def _malloc_trim() -> Any | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None


def _checked(limit: HoleLimit, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block's forward; looks at the process before it, and before its backward."""
    limit.check()
    result = own(*args, **kwargs)
    for value in result if isinstance(result, tuple) else (result,):
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(lambda grad: (limit.check(), None)[1])
            break
    return result


@contextmanager
def holes_limited(model: nn.Module, device: torch.device, kind: str | int) -> Iterator[HoleLimit]:
    """Within the block, a `HoleLimit` is checked before each repeated block's forward and backward.

    kind: of checkpointing; who recomputes nothing ("none") gives memory for time, and the limit is loose.
    On an accelerator, whose memory is not the process's, blocks are left alone. Forward methods are put back after.
    """
    limit = HoleLimit(LOOSE if kind == "none" else TIGHT)
    with ExitStack() as stack:
        for block in repeated_blocks(model) if on_cpu(device) else []:
            stack.enter_context(patched_forward(block, functools.partial(_checked, limit, block.forward)))
        yield limit
