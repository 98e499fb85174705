"""How the caching allocator's pools get memory from the driver and keep its blocks: in segments, or in one that grows.

What is common: free blocks are sorted by size and address, a block in use may be cut from one, and a freed block merges
with free neighbours. `allocator.py` has the rules that both kinds of pool serve, and their source.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

MIN_BLOCK = 512
SMALL_LIMIT = 1 << 20
SMALL_SEGMENT = 2 << 20
# Large blocks share a segment below the limit, and have one of their own, in steps, from there on.
SHARED_LIMIT = 10 << 20
SHARED_SEGMENT = 20 << 20
LARGE_STEP = 2 << 20
# Pages of addresses that a segment can grow to: more than any device has, and no two such segments overlap.
GROWING_PAGES = 1 << 26


def rounded_up(size: int, step: int) -> int:
    """The smallest multiple of `step` that is `size` or more."""
    return -(-size // step) * step


class BlockView(NamedTuple):
    """A block of a snapshot; `handle` is None if it is free."""

    address: int
    size: int
    handle: int | None


class Block:
    """A stretch of a segment, linked to its neighbours there; free while it has no handle.

    Addresses of a growing segment that have no memory behind them are a free block that is not `mapped`.
    """

    __slots__ = ("address", "after", "before", "handle", "mapped", "size")

    def __init__(self, address: int, size: int, mapped: bool = True) -> None:
        self.address, self.size, self.mapped = address, size, mapped
        self.before: Block | None = None
        self.after: Block | None = None
        self.handle: int | None = None

    def is_split(self) -> bool:
        """Whether it shares its segment with other blocks."""
        return self.before is not None or self.after is not None

    def split_off(self, size: int) -> Block:
        """Keeps the first `size` bytes and gives the rest as a block of its own."""
        rest = Block(self.address + size, self.size - size, self.mapped)
        rest.before, rest.after = self, self.after
        if rest.after is not None:
            rest.after.before = rest
        self.size, self.after = size, rest
        return rest

    def merge(self, forget: Callable[[Block], None]) -> Block:
        """Joins a free block with free neighbours of its kind, which are forgotten first; gives what it is part of."""
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
        """This block and all after it in its segment."""
        block: Block | None = self
        while block is not None:
            yield block
            block = block.after

    def _may_join(self, other: Block | None) -> bool:
        return other is not None and other.handle is None and other.mapped is self.mapped

    def _absorb_next(self) -> None:
        gone = self.after
        assert gone is not None
        self.size += gone.size
        self.after = gone.after
        if self.after is not None:
            self.after.before = self


class FreeBlocks:
    """Free blocks in the order in which they are tried: by size, then by address."""

    def __init__(self) -> None:
        self._order: list[tuple[int, int]] = []
        self._by_address: dict[int, Block] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> Block:
        return self._by_address[self._order[position][1]]

    def first_of(self, size: int) -> int:
        """The position of the first block of this size or more; the number of blocks if there is none."""
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
    """Gives out device memory up to `capacity` bytes (None: any number), and counts what is out."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.reserved = self.peak_reserved = 0
        self._next_address = 0

    def grants(self, size: int) -> bool:
        """Whether there were so many bytes left; if so, they are out now."""
        if self.capacity is not None and self.reserved + size > self.capacity:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def take_back(self, size: int) -> None:
        self.reserved -= size

    def new_address(self, size: int) -> int:
        """Each segment lies above those before it."""
        self._next_address += size
        return self._next_address - size


class Pool(Protocol):
    """The blocks of one class of sizes; `inactive_split` as in `Usage`."""

    inactive_split: int

    def take(self, size: int) -> Block | None:
        """The cached block to use for `size` bytes, if one fits."""

    def grow(self, size: int) -> Block | None:
        """A block of at least `size` bytes from the driver, unless it refuses."""

    def trim(self, block: Block, size: int) -> None:
        """Cuts a taken block down to `size` bytes, if the rest is worth it."""

    def put_back(self, block: Block) -> None:
        """Makes a block in use a free one."""

    def release_cached(self) -> None:
        """Hands back to the driver what no block in use keeps."""

    def segments(self) -> Iterator[list[BlockView]]:
        """What has memory behind it, piece by piece."""


class SegmentPool:
    """Separate segments, of a size that the first block decides about."""

    def __init__(self, driver: Driver, small: bool) -> None:
        self.inactive_split = 0
        self._driver = driver
        self._least_rest = MIN_BLOCK if small else SMALL_LIMIT + 1
        self._free = FreeBlocks()
        self._first: dict[int, Block] = {}  # of each segment, by its address

    def take(self, size: int) -> Block | None:
        position = self._free.first_of(size)
        if position == len(self._free):
            return None
        block = self._free[position]
        self._forget(block)
        return block

    def grow(self, size: int) -> Block | None:
        if size <= SMALL_LIMIT:
            wanted = SMALL_SEGMENT
        else:
            wanted = SHARED_SEGMENT if size < SHARED_LIMIT else rounded_up(size, LARGE_STEP)
        if not self._driver.grants(wanted):
            return None
        block = Block(self._driver.new_address(wanted), wanted)
        self._first[block.address] = block
        return block

    def trim(self, block: Block, size: int) -> None:
        if block.size - size >= self._least_rest:
            self._keep(block.split_off(size))

    def put_back(self, block: Block) -> None:
        block.handle = None
        self._keep(block.merge(self._forget))

    def release_cached(self) -> None:
        for block in [block for block in self._first.values() if block.handle is None and not block.is_split()]:
            self._forget(block)
            del self._first[block.address]
            self._driver.take_back(block.size)

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
    """One segment of as many addresses as can be wanted, to which memory is mapped page by page.

    Whatever is free in it can be used for anything, and whole free pages can be handed back from its middle: it counts
    nothing as `inactive_split`.
    """

    def __init__(self, driver: Driver, small: bool) -> None:
        self.inactive_split = 0
        self._driver = driver
        self._page = SMALL_SEGMENT if small else SHARED_SEGMENT
        self._free = FreeBlocks()
        self._first = Block(self._page * GROWING_PAGES, self._page * GROWING_PAGES, mapped=False)
        self._unmapped = {self._first.address: self._first}

    def take(self, size: int) -> Block | None:
        position = self._free.first_of(size)
        if position == len(self._free):
            return None
        # A block that can grow counts with what it can grow to, and so is left alone while a larger one fits.
        while position + 1 < len(self._free) and self._room(position + 1) < self._room(position):
            position += 1
        return self._free.pop(position)

    def grow(self, size: int) -> Block | None:
        block: Block | None = self._lowest_with_room(size)
        if block is not None and not block.mapped:
            block = self._map(block, min(size, block.size))
        while block is not None and block.size < size:
            assert block.after is not None
            block = self._map(block.after, min(size - block.size, block.after.size))
        if block is not None:
            self._free.remove(block)
        return block

    def trim(self, block: Block, size: int) -> None:
        if block.size - size >= MIN_BLOCK:
            self._free.add(block.split_off(size))

    def put_back(self, block: Block) -> None:
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
        """Where the free and the unmapped blocks from there on have the bytes together; at the end they always have."""
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
        raise AssertionError("a growing segment has run out of addresses")

    def _map(self, block: Block, size: int) -> Block | None:
        """Puts memory behind the first pages of an unmapped block; the free block that they are part of then."""
        size = rounded_up(size, self._page)
        if not self._driver.grants(size):
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
        self._driver.take_back(block.size)
        block.mapped = False
        block = block.merge(lambda other: self._unmapped.__delitem__(other.address))
        self._unmapped[block.address] = block
