"""The block pools of the caching allocator: with separate segments, or with one expandable segment.

In both, free blocks are sorted by size and address, a request may split a free block, and a freed block merges with
free neighbours. The rules and their source are in cuda_allocator.py.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

MIN_BLOCK = 512
SMALL_LIMIT = 1 << 20
SMALL_SEGMENT = 2 << 20
# Large blocks below the limit share a segment. From there on each has its own, a multiple of the step.
SHARED_LIMIT = 10 << 20
SHARED_SEGMENT = 20 << 20
LARGE_STEP = 2 << 20
# The number of pages in the address range of an expandable segment: more than any device has. Ranges do not overlap.
EXPANDABLE_PAGES = 1 << 26


def rounded_up(size: int, step: int) -> int:
    """Returns the smallest multiple of `step` that is at least `size`."""
    return -(-size // step) * step


class BlockView(NamedTuple):
    """A block in a snapshot; `handle` is None if it is free."""

    address: int
    size: int
    handle: int | None


class Block:
    """A range of addresses in a segment, linked to its neighbours in it; free while it has no handle.

    Addresses of an expandable segment without memory behind them form free blocks that are not `mapped`.
    """

    __slots__ = ("address", "after", "before", "handle", "mapped", "size")

    def __init__(self, address: int, size: int, mapped: bool = True) -> None:
        self.address, self.size, self.mapped = address, size, mapped
        self.before: Block | None = None
        self.after: Block | None = None
        self.handle: int | None = None

    def is_split(self) -> bool:
        """Returns whether the segment has other blocks too."""
        return self.before is not None or self.after is not None

    def split_off(self, size: int) -> Block:
        """Shrinks this block to its first `size` bytes and returns the rest as a block of its own."""
        rest = Block(self.address + size, self.size - size, self.mapped)
        rest.before, rest.after = self, self.after
        if rest.after is not None:
            rest.after.before = rest
        self.size, self.after = size, rest
        return rest

    def merge(self, forget: Callable[[Block], None]) -> Block:
        """Merges a free block with free neighbours that are mapped, or not, as it is, and returns the merged block.

        `forget` is called with each neighbour before its size changes.
        """
        block = self
        if block._may_join(self.before):
            assert self.before is not None
            block = self.before
            forget(block)
            block._absorb_next()
        if block._may_join(block.after):
            assert block.after is not None
            forget(block.after)
            block._absorb_next()
        return block

    def chain(self) -> Iterator[Block]:
        """Yields this block and all after it in the segment."""
        block: Block | None = self
        while block is not None:
            yield block
            block = block.after

    def _may_join(self, other: Block | None) -> bool:
        return other is not None and other.handle is None and other.mapped is self.mapped

    def _absorb_next(self) -> None:
        absorbed = self.after
        assert absorbed is not None
        self.size += absorbed.size
        self.after = absorbed.after
        if self.after is not None:
            self.after.before = self


class FreeBlocks:
    """Free blocks in the order in which requests try them: by size, then by address."""

    def __init__(self) -> None:
        self._order: list[tuple[int, int]] = []
        self._by_address: dict[int, Block] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> Block:
        return self._by_address[self._order[position][1]]

    def first_of(self, size: int) -> int:
        """Returns the position of the first block with at least this size; the number of blocks if there is none."""
        return bisect_left(self._order, (size, 0))

    def add(self, block: Block) -> None:
        insort(self._order, (block.size, block.address))
        self._by_address[block.address] = block

    def remove(self, block: Block) -> None:
        del self._order[bisect_left(self._order, (block.size, block.address))]
        del self._by_address[block.address]

    def pop(self, position: int) -> Block:
        return self._by_address.pop(self._order.pop(position)[1])


class Driver:
    """Grants device memory up to `capacity` bytes (None: no limit), and counts the bytes reserved."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.reserved = self.peak_reserved = 0
        self._next_address = 0

    def reserve(self, size: int) -> bool:
        """Reserves `size` bytes if the capacity allows it; returns whether it did."""
        if self.capacity is not None and self.reserved + size > self.capacity:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def release(self, size: int) -> None:
        self.reserved -= size

    def new_address(self, size: int) -> int:
        """Returns the address of a new segment, above all previous ones."""
        self._next_address += size
        return self._next_address - size


class Pool(Protocol):
    """The blocks of one class of sizes. inactive_split: see `Usage`."""

    inactive_split: int

    def take_free(self, size: int) -> Block | None:
        """Removes and returns the free block for `size` bytes; None if none fits."""

    def allocate(self, size: int) -> Block | None:
        """Returns a new block of at least `size` bytes from the driver; None if it refuses."""

    def split_remainder(self, block: Block, size: int) -> None:
        """Shrinks a taken block to `size` bytes if the remainder is large enough to be kept free."""

    def free(self, block: Block) -> None:
        """Frees a block in use, merging it with free neighbours."""

    def release_cached(self) -> None:
        """Releases memory without a block in use to the driver."""

    def segments(self) -> Iterator[list[BlockView]]:
        """Yields the blocks of each contiguous piece of memory."""


class SegmentPool:
    """A pool of separate segments, whose sizes follow from the requests that create them (rule 4)."""

    def __init__(self, driver: Driver, small: bool) -> None:
        self.inactive_split = 0
        self._driver = driver
        self._least_remainder = MIN_BLOCK if small else SMALL_LIMIT + 1
        self._free = FreeBlocks()
        self._first: dict[int, Block] = {}  # the first block of each segment, by its address

    def take_free(self, size: int) -> Block | None:
        position = self._free.first_of(size)
        if position == len(self._free):
            return None
        block = self._free[position]
        self._forget(block)
        return block

    def allocate(self, size: int) -> Block | None:
        if size <= SMALL_LIMIT:
            wanted = SMALL_SEGMENT
        else:
            wanted = SHARED_SEGMENT if size < SHARED_LIMIT else rounded_up(size, LARGE_STEP)
        if not self._driver.reserve(wanted):
            return None
        block = Block(self._driver.new_address(wanted), wanted)
        self._first[block.address] = block
        return block

    def split_remainder(self, block: Block, size: int) -> None:
        if block.size - size >= self._least_remainder:
            self._keep(block.split_off(size))

    def free(self, block: Block) -> None:
        block.handle = None
        self._keep(block.merge(self._forget))

    def release_cached(self) -> None:
        for block in [block for block in self._first.values() if block.handle is None and not block.is_split()]:
            self._forget(block)
            del self._first[block.address]
            self._driver.release(block.size)

    def segments(self) -> Iterator[list[BlockView]]:
        for first in self._first.values():
            yield [BlockView(block.address, block.size, block.handle) for block in first.chain()]

    def _keep(self, block: Block) -> None:
        self._free.add(block)
        self.inactive_split += block.size if block.is_split() else 0

    def _forget(self, block: Block) -> None:
        self._free.remove(block)
        self.inactive_split -= block.size if block.is_split() else 0


class ExpandablePool:
    """A pool of one segment with a large range of addresses, to which memory is mapped page by page.

    Nothing counts as `inactive_split`, since free whole pages can be released from the middle of the segment.
    """

    def __init__(self, driver: Driver, small: bool) -> None:
        self.inactive_split = 0
        self._driver = driver
        self._page = SMALL_SEGMENT if small else SHARED_SEGMENT
        self._free = FreeBlocks()
        self._first = Block(self._page * EXPANDABLE_PAGES, self._page * EXPANDABLE_PAGES, mapped=False)
        self._unmapped = {self._first.address: self._first}

    def take_free(self, size: int) -> Block | None:
        position = self._free.first_of(size)
        if position == len(self._free):
            return None
        # A block that can grow is compared by the size it could have, so larger blocks with less room are tried first.
        while position + 1 < len(self._free) and self._room(position + 1) < self._room(position):
            position += 1
        return self._free.pop(position)

    def allocate(self, size: int) -> Block | None:
        block: Block | None = self._lowest_with_room(size)
        if block is not None and not block.mapped:
            block = self._map(block, min(size, block.size))
        while block is not None and block.size < size:
            assert block.after is not None
            block = self._map(block.after, min(size - block.size, block.after.size))
        if block is not None:
            self._free.remove(block)
        return block

    def split_remainder(self, block: Block, size: int) -> None:
        if block.size - size >= MIN_BLOCK:
            self._free.add(block.split_off(size))

    def free(self, block: Block) -> None:
        block.handle = None
        self._free.add(block.merge(self._free.remove))

    def release_cached(self) -> None:
        for block in [self._free[position] for position in range(len(self._free))]:
            start = rounded_up(block.address, self._page)
            end = (block.address + block.size) // self._page * self._page
            if start < end:
                self._unmap(block, start, end)

    def segments(self) -> Iterator[list[BlockView]]:
        piece: list[BlockView] = []
        for block in self._first.chain():
            if block.mapped:
                piece.append(BlockView(block.address, block.size, block.handle))
            elif piece:
                yield piece
                piece = []

    def _room(self, position: int) -> int:
        block = self._free[position]
        return block.size + (block.after.size if block.after is not None and not block.after.mapped else 0)

    def _lowest_with_room(self, size: int) -> Block:
        """Returns the lowest block from which free and unmapped neighbours have `size` bytes; the last always has."""
        for address in sorted(self._unmapped):
            block = self._unmapped[address]
            if block.before is not None and block.before.handle is None:
                block = block.before
            room = 0
            for part in block.chain():
                if part.handle is not None or room >= size:
                    break
                room += part.size
            if room >= size:
                return block
        raise AssertionError("an expandable segment has run out of addresses")

    def _map(self, block: Block, size: int) -> Block | None:
        """Maps the first pages of an unmapped block. Returns the free block that they become part of."""
        size = rounded_up(size, self._page)
        if not self._driver.reserve(size):
            return None
        del self._unmapped[block.address]
        if size < block.size:
            rest = block.split_off(size)
            self._unmapped[rest.address] = rest
        block.mapped = True
        block = block.merge(self._free.remove)
        self._free.add(block)
        return block

    def _unmap(self, block: Block, start: int, end: int) -> None:
        self._free.remove(block)
        if start > block.address:
            inner = block.split_off(start - block.address)
            self._free.add(block)
            block = inner
        if end < block.address + block.size:
            self._free.add(block.split_off(end - block.address))
        self._driver.release(block.size)
        block.mapped = False
        block = block.merge(lambda other: self._unmapped.__delitem__(other.address))
        self._unmapped[block.address] = block
