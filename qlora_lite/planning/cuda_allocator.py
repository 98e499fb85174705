"""A model of torch's CUDA caching allocator: the bytes it reserves for a sequence of allocations. Without torch.

torch gets segments from the driver and hands out blocks of them. A process therefore reserves more of the device than
its tensors need: sizes are rounded up, freed segments are kept, and free blocks between blocks in use fit few requests.
This follows c10/cuda/CUDACachingAllocator.cpp and the constants of c10/core/AllocatorConfig.h in torch 2.13, by these
rules (torch's functions in parentheses):

1. A size is rounded up to a multiple of 512 bytes (`round_size`).
2. Blocks of up to 1 MiB come from the small pool, larger ones from the large pool (`get_pool`).
3. The smallest free block of the pool that fits is taken; of equal ones, the one at the lowest address
   (`get_free_block`, `BlockComparatorSize`).
4. If none fits, the driver is asked for a segment: 2 MiB in the small pool; in the large pool 20 MiB for less than
   10 MiB, else the size rounded up to a multiple of 2 MiB (`get_allocation_size`).
5. The remainder of a block is split off and stays free if it is at least 512 bytes in the small pool, or more than
   1 MiB in the large pool (`should_split`). Otherwise it stays part of the block and counts as allocated.
6. A freed block merges with free neighbours in its segment. The segment stays reserved (`free_block`).
7. If the driver refuses, all segments of both pools without a block in use are released, and the driver is asked once
   more. If it refuses again, the device is out of memory (`malloc`, `release_cached_blocks`).
8. A storage that is resized gets its new block before the old one is freed, even if it shrinks. A storage resized to 0
   bytes is only freed (`resize_bytes_cuda` in aten/src/ATen/native/cuda/Resize.cpp).

With PYTORCH_ALLOC_CONF=expandable_segments:True each pool has one segment, which grows and shrinks by pages of 2 MiB
(small) or 20 MiB (large), and these rules change (`get_free_block`, `try_allocate_expandable_block`, `unmap_block`):

3. A free block in front of unmapped addresses is compared by its size together with these.
4. Pages are mapped at the lowest address where free and unmapped neighbours together have the size.
5. A remainder of 512 bytes or more is split off in both pools.
7. Free whole pages are unmapped.

Not modelled: other settings, several streams, pools of CUDA graphs, and memory outside of the allocator (the context,
libraries). The driver chooses addresses of segments; here each lies above the previous ones. That only decides between
free blocks of equal size. An expandable segment has no end here, while torch starts another one after 1 1/8 of the
device's memory, which only holes from rule 7 can use up.
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
    """Bytes by the names of `torch.cuda.memory_stats`, at one moment, or each at its own peak.

    allocated: blocks in use, rounded up. reserved: segments. inactive_split: free blocks in segments that are in use,
    which serve only later requests that fit into them; 0 with expandable segments.
    """

    allocated: int
    reserved: int
    inactive_split: int

    def highest(self, other: Usage) -> Usage:
        """Returns the larger value of each entry."""
        return Usage(*map(max, self, other))


class StorageChange(Protocol):
    """A storage grows or shrinks by `delta` bytes; `TraceEvent` is one of these."""

    @property
    def phase(self) -> str | None: ...
    @property
    def serial(self) -> int: ...
    @property
    def delta(self) -> int: ...


@dataclass(frozen=True)
class Replay:
    """The result of `replay`.

    peak: over all changes. by_phase: the peak while a phase was the innermost one, its start included, in the order of
    first changes. end: after the last change. retries: how often cached segments had to be released (rule 7).
    """

    peak: Usage
    by_phase: dict[str | None, Usage]
    end: Usage
    retries: int


@final
class CachingAllocator:
    """The allocator of one device and one stream, by the rules of this file.

    capacity: bytes that the driver can give, None for no limit. expandable: use expandable segments. Callers identify
    their blocks by handles. The attributes `allocated`, `reserved` and `inactive_split` (see `Usage`) have peaks since
    the start or `reset_peaks`. `retries` counts how often cached segments had to be released for a request.
    """

    def __init__(self, capacity: int | None = None, expandable: bool = False) -> None:
        if capacity is not None and capacity < 0:
            raise ConfigError(f"capacity must be a number of bytes, or None for no limit; got {capacity}")
        pool = ExpandablePool if expandable else SegmentPool
        self._driver = Driver(capacity)
        self._small: Pool = pool(self._driver, small=True)
        self._large: Pool = pool(self._driver, small=False)
        self._in_use: dict[int, tuple[Pool, Block]] = {}
        self.allocated = self.peak_allocated = self.peak_inactive_split = self.retries = 0

    @property
    def reserved(self) -> int:
        """Bytes of all segments."""
        return self._driver.reserved

    @property
    def peak_reserved(self) -> int:
        """The peak of `reserved`."""
        return self._driver.peak_reserved

    @property
    def inactive_split(self) -> int:
        """Bytes of free blocks in segments that are in use."""
        return self._small.inactive_split + self._large.inactive_split

    def malloc(self, handle: int, size: int) -> None:
        """Allocates a block of at least `size` bytes for the handle.

        Raises ConfigError for a handle that has a block, or a size below 1 (torch allocates no block then), and
        DeviceMemoryError if the device is out of memory. Cached segments are released by then; blocks in use stay.
        """
        if handle in self._in_use:
            raise ConfigError(f"handle {handle} already has a block; free it first, or resize it")
        self._in_use[handle] = self._block_for(handle, size)

    def free(self, handle: int) -> None:
        """Frees the block of the handle. Raises ConfigError if it has none."""
        self._free_block(*self._block_of(handle))
        del self._in_use[handle]

    def resize(self, handle: int, size: int) -> None:
        """Allocates a new block for the handle, then frees the old one. Raises what `malloc` and `free` raise."""
        old = self._block_of(handle)
        self._in_use[handle] = self._block_for(handle, size)
        self._free_block(*old)

    def release_cached(self) -> None:
        """Releases segments (or pages) without a block in use to the driver, as `torch.cuda.empty_cache` does."""
        self._large.release_cached()
        self._small.release_cached()

    def usage(self) -> Usage:
        """Returns the bytes now."""
        return Usage(self.allocated, self.reserved, self.inactive_split)

    def peak(self) -> Usage:
        """Returns the peak of each entry since the start or `reset_peaks`."""
        return Usage(self.peak_allocated, self.peak_reserved, self.peak_inactive_split)

    def reset_peaks(self) -> None:
        """Sets the peaks to the bytes now, as `torch.cuda.reset_peak_memory_stats` does."""
        self.peak_allocated, self._driver.peak_reserved, self.peak_inactive_split = self.usage()

    def snapshot(self) -> list[list[BlockView]]:
        """Returns the blocks of each segment, or contiguous piece of an expandable one, in the order of addresses."""
        return sorted([*self._small.segments(), *self._large.segments()], key=lambda segment: segment[0].address)

    def _block_of(self, handle: int) -> tuple[Pool, Block]:
        if handle not in self._in_use:
            raise ConfigError(f"handle {handle} has no block; allocate one first")
        return self._in_use[handle]

    def _block_for(self, handle: int, size: int) -> tuple[Pool, Block]:
        if size < 1:
            raise ConfigError(f"a block must have at least 1 byte; got {size} for handle {handle}")
        size = rounded_up(size, MIN_BLOCK)
        pool = self._small if size <= SMALL_LIMIT else self._large
        block = pool.take_free(size) or pool.allocate(size) or self._allocate_after_release(pool, size)
        pool.split_remainder(block, size)
        block.handle = handle
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_inactive_split = max(self.peak_inactive_split, self.inactive_split)
        return pool, block

    def _allocate_after_release(self, pool: Pool, size: int) -> Block:
        self.retries += 1
        self.release_cached()
        block = pool.allocate(size)
        if block is None:
            raise DeviceMemoryError(
                f"the device is out of memory for a block of {size:,} bytes: "
                f"it has {self._driver.capacity:,}, of which {self.reserved:,} are reserved "
                f"({self.allocated:,} allocated); "
                "keep less alive at once, or use a device with more memory"
            )
        return block

    def _free_block(self, pool: Pool, block: Block) -> None:
        self.allocated -= block.size
        pool.free(block)
        self.peak_inactive_split = max(self.peak_inactive_split, self.inactive_split)


def replay(changes: Iterable[StorageChange], capacity: int | None = None, expandable: bool = False) -> Replay:
    """Replays changes of storages with a new allocator, for example `StorageTrace.timeline()` of a run on one device.

    capacity, expandable: as for `CachingAllocator`. Raises ConfigError if a storage shrinks below 0 bytes, and
    DeviceMemoryError, which names the phase, if `capacity` bytes are not enough.
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
    """Applies one change by rule 8."""
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
