"""Keeps freed pages of host memory in the process while it works, and hands them back between its phases.

glibc's malloc hands every block above 128 KiB (at most 32 MiB, as it learns) back to the kernel when it is freed, and
gets zeroed pages for the next one. Unpacking a weight and dropping it again, hundreds of times a step, then spends
more time in page faults than in arithmetic. The two limits below (mallopt(3)) let malloc reuse the pages instead.

What is reused in one order is full of holes for another: batches of other lengths, and backward after forward, would
touch ever more of the heap, up to several times what lives. So the pages of all holes go back before each of them,
which costs some 2 % of a step's time and saves about a sixth of its resident peak, and the growth (malloc_trim(3)).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
# glibc refuses a larger one.
LARGEST_MMAP_THRESHOLD = 32 << 20
# Free memory at the top of the heap beyond this goes back to the kernel.
KEPT_BYTES = 256 << 20


@functools.cache
def keep_freed_pages() -> bool:
    """Sets malloc's limits for this process, once; whether it could be done (glibc only)."""
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


@functools.cache
def _malloc_trim() -> Any | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
