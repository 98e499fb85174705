"""What torch's caching allocator would reserve on a CUDA device for a sequence of allocations. Arithmetic, no torch.

torch asks the driver for segments and hands out blocks of them. So a process takes more from the device (`reserved`)
than its tensors need: sizes are rounded, freed segments are kept, and holes between blocks in use fit nothing. This
follows c10/cuda/CUDACachingAllocator.cpp in its default settings, with the constants of c10/core/AllocatorConfig.h of
torch 2.13, rule by rule:

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

Not modelled: expandable segments and the other settings of PYTORCH_ALLOC_CONF, several streams, pools of CUDA graphs,
and what a process takes past the allocator (the context, workspaces of libraries). The addresses of segments are the
driver's choice: here each lies above those before it, which decides between free blocks of the same size, no more.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple, Protocol, final

from qlora_lite.errors import ConfigError, DeviceMemoryError

MIN_BLOCK = 512
SMALL_LIMIT = 1 << 20
SMALL_SEGMENT = 2 << 20
# Large blocks share a segment below the limit, and have one of their own, in steps, from there on.
SHARED_LIMIT = 10 << 20
SHARED_SEGMENT = 20 << 20
LARGE_STEP = 2 << 20


class Usage(NamedTuple):
    """Bytes in torch's words (`torch.cuda.memory_stats`), now or each at its own peak.

    allocated: rounded blocks in use. reserved: segments. inactive_split: free blocks in segments that are in use, which
    nobody but this allocator can use, and only for what fits.
    """

    allocated: int
    reserved: int
    inactive_split: int

    def highest(self, other: Usage) -> Usage:
        """Entry by entry, the larger one."""
        return Usage(*map(max, self, other))


class BlockView(NamedTuple):
    """A block of a snapshot; `handle` is None if it is free."""

    address: int
    size: int
    handle: int | None


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


class _Block:
    """A stretch of a segment, linked to its neighbours there; free while it has no handle."""

    __slots__ = ("address", "after", "before", "handle", "pool", "size")

    def __init__(self, pool: _Pool, address: int, size: int) -> None:
        self.pool, self.address, self.size = pool, address, size
        self.before: _Block | None = None
        self.after: _Block | None = None
        self.handle: int | None = None

    def is_split(self) -> bool:
        return self.before is not None or self.after is not None

    def split_off(self, size: int) -> _Block:
        """Keeps the first `size` bytes and gives the rest as a block of its own."""
        rest = _Block(self.pool, self.address + size, self.size - size)
        rest.before, rest.after = self, self.after
        if rest.after is not None:
            rest.after.before = rest
        self.size, self.after = size, rest
        return rest

    def absorb_next(self) -> None:
        gone = self.after
        assert gone is not None
        self.size += gone.size
        self.after = gone.after
        if self.after is not None:
            self.after.before = self


class _Pool:
    """The free blocks of one pool, sorted as they are tried: by size, then by address."""

    def __init__(self, least_rest: int) -> None:
        self.least_rest = least_rest
        self._order: list[tuple[int, int]] = []
        self._by_address: dict[int, _Block] = {}

    def add(self, block: _Block) -> None:
        insort(self._order, (block.size, block.address))
        self._by_address[block.address] = block

    def remove(self, block: _Block) -> None:
        del self._order[bisect_left(self._order, (block.size, block.address))]
        del self._by_address[block.address]

    def take_fitting(self, size: int) -> _Block | None:
        position = bisect_left(self._order, (size, 0))
        if position == len(self._order):
            return None
        return self._by_address.pop(self._order.pop(position)[1])

    def whole_segments(self) -> list[_Block]:
        return [block for block in self._by_address.values() if not block.is_split()]


@final
class CachingAllocator:
    """The allocator of one device and one stream, by the rules above.

    `capacity`: the bytes that the driver has for it, None for any number. Callers name their blocks by handles.
    To be read, in bytes: `allocated`, `reserved`, `inactive_split` (see `Usage`) and their peaks since the start or
    `reset_peaks`; and `retries`, how often cached segments had to be handed back for a new one.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 0:
            raise ConfigError(f"the capacity of a device is a number of bytes, or None for any; got {capacity}")
        self.capacity = capacity
        self.allocated = self.reserved = self.inactive_split = self.retries = 0
        self.peak_allocated = self.peak_reserved = self.peak_inactive_split = 0
        self._small = _Pool(least_rest=MIN_BLOCK)
        self._large = _Pool(least_rest=SMALL_LIMIT + 1)
        self._in_use: dict[int, _Block] = {}
        self._segments: dict[int, _Block] = {}  # by address: the first block
        self._next_address = 0

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
        self._take_back(self._block_of(handle))
        del self._in_use[handle]

    def resize(self, handle: int, size: int) -> None:
        """Gives the handle a new block and takes the old one back after that. Raises what `malloc` and `free` do."""
        old = self._block_of(handle)
        self._in_use[handle] = self._block_for(handle, size)
        self._take_back(old)

    def release_cached(self) -> None:
        """Hands all segments without a block in use back to the driver, as `torch.cuda.empty_cache` does."""
        for pool in (self._large, self._small):
            for segment in pool.whole_segments():
                pool.remove(segment)
                del self._segments[segment.address]
                self.reserved -= segment.size

    def usage(self) -> Usage:
        """What is in use now."""
        return Usage(self.allocated, self.reserved, self.inactive_split)

    def peak(self) -> Usage:
        """The most of each since the start or `reset_peaks`."""
        return Usage(self.peak_allocated, self.peak_reserved, self.peak_inactive_split)

    def reset_peaks(self) -> None:
        """Lets the peaks start from what is in use now, as `torch.cuda.reset_peak_memory_stats` does."""
        self.peak_allocated, self.peak_reserved, self.peak_inactive_split = self.usage()

    def snapshot(self) -> list[list[BlockView]]:
        """The blocks of each segment, both in the order of their addresses."""
        segments = []
        for address in sorted(self._segments):
            blocks, block = [], self._segments.get(address)
            while block is not None:
                blocks.append(BlockView(block.address, block.size, block.handle))
                block = block.after
            segments.append(blocks)
        return segments

    def _block_of(self, handle: int) -> _Block:
        if handle not in self._in_use:
            raise ConfigError(f"handle {handle} has no block; allocate one first")
        return self._in_use[handle]

    def _block_for(self, handle: int, size: int) -> _Block:
        if size < 1:
            raise ConfigError(f"a block has at least 1 byte; got {size} for handle {handle}")
        size = _rounded_up(size, MIN_BLOCK)
        pool = self._small if size <= SMALL_LIMIT else self._large
        block = pool.take_fitting(size)
        if block is None:
            block = self._new_segment(pool, size)
        elif block.is_split():
            self.inactive_split -= block.size
        if block.size - size >= pool.least_rest:
            rest = block.split_off(size)
            pool.add(rest)
            self._add_inactive(rest)
        block.handle = handle
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def _new_segment(self, pool: _Pool, size: int) -> _Block:
        wanted = _segment_bytes(size)
        if not self._has_room(wanted):
            self.retries += 1
            self.release_cached()
            if not self._has_room(wanted):
                raise DeviceMemoryError(
                    f"the device is out of memory: a block of {size:,} bytes wants a segment of {wanted:,}, "
                    f"and of {self.capacity:,} {self.reserved:,} are reserved ({self.allocated:,} allocated); "
                    "have less alive at once, or take a device with more memory"
                )
        block = _Block(pool, self._next_address, wanted)
        self._next_address += wanted
        self._segments[block.address] = block
        self.reserved += wanted
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _has_room(self, size: int) -> bool:
        return self.capacity is None or self.reserved + size <= self.capacity

    def _take_back(self, block: _Block) -> None:
        self.allocated -= block.size
        block.handle = None
        if block.before is not None and block.before.handle is None:
            block = block.before
            self._remove_inactive(block)
            block.absorb_next()
        if block.after is not None and block.after.handle is None:
            self._remove_inactive(block.after)
            block.absorb_next()
        block.pool.add(block)
        if block.is_split():
            self._add_inactive(block)

    def _add_inactive(self, block: _Block) -> None:
        self.inactive_split += block.size
        self.peak_inactive_split = max(self.peak_inactive_split, self.inactive_split)

    def _remove_inactive(self, block: _Block) -> None:
        block.pool.remove(block)
        self.inactive_split -= block.size


def _rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _segment_bytes(size: int) -> int:
    """What the driver is asked for when no free block fits a rounded size (rule 4)."""
    if size <= SMALL_LIMIT:
        return SMALL_SEGMENT
    return SHARED_SEGMENT if size < SHARED_LIMIT else _rounded_up(size, LARGE_STEP)


def replay(changes: Iterable[StorageChange], capacity: int | None = None) -> Replay:
    """Puts changes of storages through a new allocator: `StorageTrace.timeline()`, if all was on the device.

    Raises ConfigError if a storage shrinks below nothing, DeviceMemoryError, which names the phase, if `capacity` bytes
    do not suffice.
    """
    allocator = CachingAllocator(capacity)
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
