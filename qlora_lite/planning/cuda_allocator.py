"""What torch's caching allocator would reserve on a CUDA device for a sequence of allocations. Arithmetic, no torch.

torch asks the driver for segments and hands out blocks of them. So a process takes more from the device (`reserved`)
than its tensors need: sizes are rounded, freed segments are kept, and holes between blocks in use fit nothing. This
follows c10/cuda/CUDACachingAllocator.cpp, with the constants of c10/core/AllocatorConfig.h of torch 2.13, by rule:

1. A size is rounded up to 512 bytes (`round_size`).
2. Blocks of up to 1 MiB come from one pool, larger ones from another (`get_pool`).
3. The smallest free block of the pool that fits is taken; of equal ones, that at the lowest address
   (`get_free_block`, `BlockComparatorSize`).
4. If none fits, the driver is asked for a segment: of 2 MiB in the small pool; of 20 MiB for less than 10 MiB, else of
   the size rounded up to 2 MiB, in the large one (`get_allocation_size`).
5. What a block has beyond the size asked for is split off and stays free if it is 512 bytes or more in the small pool,
   more than 1 MiB in the large one (`should_split`). Otherwise it goes with the block and counts as allocated.
6. A freed block merges with free neighbours in its segment, and the segment stays reserved (`free_block`).
7. When the driver refuses, all segments without a block in use are handed back, those of both pools, and the driver is
   asked once more; if it refuses again, memory is out (`malloc`, `release_cached_blocks`).
8. A storage that is resized gets a new block before it gives back the old one, even if it shrinks; one that is resized
   to nothing only gives back (`resize_bytes_cuda` in aten/src/ATen/native/cuda/Resize.cpp).

With PYTORCH_ALLOC_CONF=expandable_segments:True each pool has one segment that grows and shrinks by pages of 2 or
20 MiB. Then for rule 3 a block before unmapped addresses counts with these; for 4 pages are mapped at the lowest place
where free and unmapped neighbours have the size together; for 5 a rest of 512 bytes is split off in both pools; for 7
whole pages that are free are handed back (`get_free_block`, `try_allocate_expandable_block`, `unmap_block`).

Not modelled: other settings, several streams, pools of CUDA graphs, and what a process takes past the allocator (the
context, workspaces of libraries). The addresses of segments are the driver's choice: here each lies above those before
it, which decides between free blocks of the same size, no more. A segment that grows has no end here; torch begins
another after 1 1/8 of the device's memory, which holes from rule 7 alone can fill.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple, Protocol, final

from qlora_lite.errors import ConfigError, DeviceMemoryError
from qlora_lite.planning.cuda_block_pools import (
    MIN_BLOCK,
    SMALL_LIMIT,
    Block,
    BlockView,
    Driver,
    ExpandablePool,
    Pool,
    SegmentPool,
    rounded_up,
)


class Usage(NamedTuple):
    """Bytes in torch's words (`torch.cuda.memory_stats`), now or each at its own peak.

    allocated: rounded blocks in use. reserved: segments. inactive_split: free blocks in segments that are in use, which
    nobody but this allocator can use, and only for what fits; none in expandable segments.
    """

    allocated: int
    reserved: int
    inactive_split: int

    def highest(self, other: Usage) -> Usage:
        """Entry by entry, the larger one."""
        return Usage(*map(max, self, other))


class StorageChange(Protocol):
    """`delta` bytes more, or fewer, of a storage: what a `TraceEvent` says."""

    @property
    def phase(self) -> str | None: ...
    @property
    def serial(self) -> int: ...
    @property
    def delta(self) -> int: ...


@dataclass(frozen=True)
class Replay:
    """What a sequence of changes came to.

    peak: over all of them. by_phase: while a phase was the innermost one, what was there when it was entered included,
    in the order of their first changes. end: afterwards. retries: how often cached segments had to be handed back.
    """

    peak: Usage
    by_phase: dict[str | None, Usage]
    end: Usage
    retries: int


@final
class CachingAllocator:
    """The allocator of one device and one stream, by the rules above.

    `capacity`: the bytes that the driver has for it, None for any number; `expandable`: with expandable segments.
    Callers name their blocks by handles. To be read: `allocated`, `reserved`, `inactive_split` (see `Usage`) and their
    peaks since the start or `reset_peaks`; and `retries`, how often what was cached had to be handed back for more.
    """

    def __init__(self, capacity: int | None = None, expandable: bool = False) -> None:
        if capacity is not None and capacity < 0:
            raise ConfigError(f"the capacity of a device is a number of bytes, or None for any; got {capacity}")
        kind = ExpandablePool if expandable else SegmentPool
        self._driver = Driver(capacity)
        self._small: Pool = kind(self._driver, small=True)
        self._large: Pool = kind(self._driver, small=False)
        self._in_use: dict[int, tuple[Pool, Block]] = {}
        self.allocated = self.peak_allocated = self.peak_inactive_split = self.retries = 0

    @property
    def reserved(self) -> int:
        """Bytes of all segments."""
        return self._driver.reserved

    @property
    def peak_reserved(self) -> int:
        """The most that was `reserved`."""
        return self._driver.peak_reserved

    @property
    def inactive_split(self) -> int:
        """Bytes of free blocks in segments that are in use."""
        return self._small.inactive_split + self._large.inactive_split

    def malloc(self, handle: int, size: int) -> None:
        """Gives the handle a block of at least `size` bytes.

        Raises ConfigError for a handle that has one, or fewer bytes than 1 (torch asks for no block then), and
        DeviceMemoryError if memory is out: what was cached is handed back by then, blocks in use stay.
        """
        if handle in self._in_use:
            raise ConfigError(f"handle {handle} has a block already; free it first, or resize it")
        self._in_use[handle] = self._block_for(handle, size)

    def free(self, handle: int) -> None:
        """Takes the handle's block back. Raises ConfigError if it has none."""
        self._take_back(*self._block_of(handle))
        del self._in_use[handle]

    def resize(self, handle: int, size: int) -> None:
        """Gives the handle a new block and takes the old one back after that. Raises what `malloc` and `free` do."""
        old = self._block_of(handle)
        self._in_use[handle] = self._block_for(handle, size)
        self._take_back(*old)

    def release_cached(self) -> None:
        """Hands what no block in use keeps back to the driver, as `torch.cuda.empty_cache` does."""
        self._large.release_cached()
        self._small.release_cached()

    def usage(self) -> Usage:
        """What is in use now."""
        return Usage(self.allocated, self.reserved, self.inactive_split)

    def peak(self) -> Usage:
        """The most of each since the start or `reset_peaks`."""
        return Usage(self.peak_allocated, self.peak_reserved, self.peak_inactive_split)

    def reset_peaks(self) -> None:
        """Lets the peaks start from what is in use now, as `torch.cuda.reset_peak_memory_stats` does."""
        self.peak_allocated, self._driver.peak_reserved, self.peak_inactive_split = self.usage()

    def snapshot(self) -> list[list[BlockView]]:
        """The blocks of each segment, or connected piece of an expandable one, in the order of their addresses."""
        return sorted([*self._small.segments(), *self._large.segments()], key=lambda segment: segment[0].address)

    def _block_of(self, handle: int) -> tuple[Pool, Block]:
        if handle not in self._in_use:
            raise ConfigError(f"handle {handle} has no block; allocate one first")
        return self._in_use[handle]

    def _block_for(self, handle: int, size: int) -> tuple[Pool, Block]:
        if size < 1:
            raise ConfigError(f"a block has at least 1 byte; got {size} for handle {handle}")
        size = rounded_up(size, MIN_BLOCK)
        pool = self._small if size <= SMALL_LIMIT else self._large
        block = pool.take(size) or pool.grow(size) or self._grown_after_release(pool, size)
        pool.trim(block, size)
        block.handle = handle
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_inactive_split = max(self.peak_inactive_split, self.inactive_split)
        return pool, block

    def _grown_after_release(self, pool: Pool, size: int) -> Block:
        self.retries += 1
        self.release_cached()
        block = pool.grow(size)
        if block is None:
            raise DeviceMemoryError(
                f"the device is out of memory for a block of {size:,} bytes: "
                f"of {self._driver.capacity:,} it has {self.reserved:,} are reserved ({self.allocated:,} allocated); "
                "have less alive at once, or take a device with more memory"
            )
        return block

    def _take_back(self, pool: Pool, block: Block) -> None:
        self.allocated -= block.size
        pool.put_back(block)
        self.peak_inactive_split = max(self.peak_inactive_split, self.inactive_split)


def replay(changes: Iterable[StorageChange], capacity: int | None = None, expandable: bool = False) -> Replay:
    """Puts changes of storages through a new allocator: `StorageTrace.timeline()`, if all was on the device.

    Raises ConfigError if a storage shrinks below nothing, DeviceMemoryError, which names the phase, if `capacity` bytes
    do not suffice.
    """
    allocator = CachingAllocator(capacity, expandable)
    sizes: dict[int, int] = {}
    by_phase: dict[str | None, Usage] = {}
    for phase, stretch in groupby(changes, key=attrgetter("phase")):
        allocator.reset_peaks()
        try:
            for change in stretch:
                _apply(allocator, sizes, change.serial, change.delta)
        except DeviceMemoryError as error:
            where = "outside of all phases" if phase is None else f"in phase {phase!r}"
            raise DeviceMemoryError(f"{where}, {error}") from error
        by_phase[phase] = allocator.peak().highest(by_phase.get(phase, allocator.usage()))
    peak = Usage(0, 0, 0)
    for usage in by_phase.values():
        peak = peak.highest(usage)
    return Replay(peak, by_phase, allocator.usage(), allocator.retries)


def _apply(allocator: CachingAllocator, sizes: dict[int, int], serial: int, delta: int) -> None:
    """Rule 8: what one change makes the allocator do."""
    old = sizes.get(serial, 0)
    new = sizes[serial] = old + delta
    if new < 0:
        raise ConfigError(f"storage {serial} has {old} bytes and cannot lose {-delta}; replay a trace from its start")
    if not old and new:
        allocator.malloc(serial, new)
    elif old and not new:
        allocator.free(serial)
    elif delta:
        allocator.resize(serial, new)
