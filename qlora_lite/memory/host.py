"""Keeps freed pages of host memory in the process, so that large temporaries do not cost a page fault for each 4 KiB.

glibc's malloc hands every block above 128 KiB (at most 32 MiB, as it learns) back to the kernel when it is freed, and
gets zeroed pages for the next one. Unpacking a weight and dropping it again, hundreds of times a step, then spends
more time in page faults than in arithmetic. The two limits below (mallopt(3)) let malloc reuse the pages instead.
"""

from __future__ import annotations

import ctypes
import functools

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
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError):
        return False
