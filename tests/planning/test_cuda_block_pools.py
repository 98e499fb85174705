"""Tests of expandable segments: each rule, the numbers of torch's own test, and a second model of pages alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.errors import DeviceMemoryError
from qlora_lite.planning.cuda_allocator import CachingAllocator, Usage
from qlora_lite.planning.cuda_block_pools import EXPANDABLE_PAGES, Block, Driver, FreeBlocks

KIB, MIB = 1 << 10, 1 << 20
PAGES = {True: 2 * MIB, False: 20 * MIB}


def filled(*sizes: int, capacity: int | None = None) -> CachingAllocator:
    allocator = CachingAllocator(capacity, expandable=True)
    for handle, size in enumerate(sizes):
        allocator.malloc(handle, size)
    return allocator


def starts(allocator: CachingAllocator, small: bool = False) -> dict[int, int]:
    """Returns the address of each block in use, relative to its segment."""
    origin, other = (PAGES[which] * EXPANDABLE_PAGES for which in (small, not small))
    blocks = [block for piece in allocator.snapshot() for block in piece]
    mine = [block for block in blocks if block.address >= origin and not origin < other <= block.address]
    return {block.handle: block.address - origin for block in mine if block.handle is not None}


# Common parts


def test_a_block_is_cut_and_joined_in_its_chain() -> None:
    first = Block(0, 100)
    third = first.split_off(60)
    second = first.split_off(40)
    assert [(block.address, block.size) for block in first.chain()] == [(0, 40), (40, 20), (60, 40)]
    assert second.before is first and second.after is third and third.before is second
    third.handle = 7
    forgotten: list[Block] = []
    assert second.merge(forgotten.append) is first and forgotten == [first]
    assert [(block.address, block.size) for block in first.chain()] == [(0, 60), (60, 40)]
    assert third.before is first and first.is_split()


def test_free_blocks_are_tried_by_size_then_address() -> None:
    free = FreeBlocks()
    blocks = [Block(address, size) for address, size in ((0, 30), (100, 10), (200, 30), (300, 20))]
    for block in reversed(blocks):
        free.add(block)
    assert [free[n].address for n in range(len(free))] == [100, 300, 0, 200]
    assert [free.first_of(size) for size in (1, 10, 11, 30, 31)] == [0, 0, 1, 2, 4]
    free.remove(blocks[3])
    assert free.pop(1) is blocks[0] and len(free) == 2 and free[1] is blocks[2]


def test_a_driver_reserves_up_to_its_capacity() -> None:
    driver = Driver(capacity=10)
    assert driver.reserve(6) and not driver.reserve(5) and driver.reserve(4)
    driver.release(8)
    assert (driver.reserved, driver.peak_reserved) == (2, 10)
    assert Driver(capacity=None).reserve(1 << 60)
    assert [driver.new_address(size) for size in (5, 7, 1)] == [0, 5, 12]


# One rule after the other


@pytest.mark.parametrize(("size", "mapped"), [(1, 2), (MIB, 2), (MIB + 1, 20), (20 * MIB, 20), (20 * MIB + 1, 40)])
def test_memory_is_mapped_by_whole_pages(size: int, mapped: int) -> None:
    assert filled(size).reserved == mapped * MIB


def test_the_last_free_block_grows_by_what_it_lacks() -> None:
    # 12 of 20 MiB are free at the end; 30 MiB take them and 18 more, so one page. Fixed segments would take 30 MiB.
    allocator = filled(8 * MIB, 30 * MIB)
    assert allocator.usage() == Usage(38 * MIB, 40 * MIB, 0)
    assert starts(allocator) == {0: 0, 1: 8 * MIB}


def test_any_rest_of_512_bytes_is_split_off_in_both_pools() -> None:
    allocator = filled(20 * MIB - 512, 2 * MIB)
    assert allocator.allocated == 22 * MIB - 512
    assert starts(allocator)[1] == 20 * MIB - 512


def test_a_block_that_can_grow_is_left_while_a_larger_one_fits() -> None:
    # A hole of 8 MiB at the start, 5 MiB free at the end: for 4 MiB the end fits best, and is left all the same.
    allocator = filled(8 * MIB, 7 * MIB)
    allocator.free(0)
    allocator.malloc(2, 4 * MIB)
    assert starts(allocator) == {1: 8 * MIB, 2: 0}
    # What is left of the hole is smaller than the end, and fits no 5 MiB.
    allocator.malloc(3, 5 * MIB)
    assert starts(allocator)[3] == 15 * MIB


def test_of_equal_blocks_the_one_at_the_lowest_address_is_taken() -> None:
    allocator = filled(*[2 * MIB] * 6)
    for handle in (3, 1):
        allocator.free(handle)
    allocator.malloc(6, 2 * MIB)
    assert starts(allocator)[6] == 2 * MIB


def test_whole_free_pages_are_released_from_the_middle_and_mapped_again_there() -> None:
    allocator = filled(15 * MIB, 50 * MIB, 5 * MIB)
    allocator.free(1)
    # Of 15..65 MiB the pages 20..40 and 40..60 are free: 5 MiB before and 5 MiB after them stay.
    allocator.release_cached()
    assert allocator.usage() == Usage(20 * MIB, 40 * MIB, 0)
    assert [sum(block.size for block in piece) for piece in allocator.snapshot()] == [20 * MIB, 20 * MIB]
    # 24 MiB: 5 before, and a page of the two.
    allocator.malloc(3, 24 * MIB)
    assert starts(allocator) == {0: 0, 2: 65 * MIB, 3: 15 * MIB}
    assert allocator.reserved == 60 * MIB
    # 26 MiB fit there with the other page and 5 after them; 27 do not, and go to the end.
    allocator.malloc(4, 27 * MIB)
    assert starts(allocator)[4] == 70 * MIB
    allocator.malloc(5, 26 * MIB)
    assert starts(allocator)[5] == 39 * MIB
    assert allocator.usage() == Usage(97 * MIB, 100 * MIB, 0)


def test_a_block_across_a_page_boundary_stays_whole_when_it_holds_no_page() -> None:
    allocator = filled(15 * MIB, 10 * MIB, 5 * MIB)
    allocator.free(1)
    allocator.release_cached()
    allocator.malloc(3, 10 * MIB)
    assert allocator.usage() == Usage(30 * MIB, 40 * MIB, 0)
    assert starts(allocator)[3] == 15 * MIB


def test_pages_of_one_hole_are_mapped_together_or_not_at_all() -> None:
    allocator = filled(20 * MIB, 20 * MIB, 20 * MIB, 20 * MIB, capacity=80 * MIB)
    # Two pages side by side, released one after the other.
    for handle in (1, 2):
        allocator.free(handle)
        allocator.release_cached()
    # Of the 40 MiB that the driver has again, a small page takes 2: one large page is left, and 40 MiB want two.
    allocator.malloc(4, 1)
    with pytest.raises(DeviceMemoryError):
        allocator.malloc(5, 40 * MIB)
    assert allocator.reserved == 42 * MIB


def test_pages_of_several_holes_are_mapped_one_hole_after_the_other() -> None:
    allocator = filled(*[20 * MIB] * 5, 1, capacity=102 * MIB)
    allocator.free(1)
    allocator.free(3)
    allocator.release_cached()
    # A hole, a free page and a hole: 60 MiB in a row, for two new pages.
    allocator.free(2)
    allocator.malloc(6, 21 * MIB)
    assert starts(allocator)[6] == 20 * MIB and allocator.reserved == 82 * MIB
    allocator.free(6)
    allocator.malloc(7, 60 * MIB)
    assert starts(allocator)[7] == 20 * MIB and allocator.reserved == 102 * MIB


def test_a_hole_is_mapped_even_if_the_next_one_cannot_be() -> None:
    allocator = filled(*[20 * MIB] * 5, capacity=100 * MIB)
    allocator.free(1)
    allocator.free(3)
    allocator.release_cached()
    allocator.free(2)
    # As above, but a small page leaves the driver one large page. It is mapped; then all three are released, and
    # they are one too many with what is left.
    allocator.malloc(5, 1)
    allocator.reset_peaks()
    with pytest.raises(DeviceMemoryError):
        allocator.malloc(6, 60 * MIB)
    assert (allocator.peak_reserved, allocator.reserved) == (82 * MIB, 42 * MIB)


def test_holes_that_are_too_small_for_fixed_segments_do_not_put_memory_out() -> None:
    # As in test_cuda_allocator.py: 16 of 20 MiB are free, in two holes. Here the last one grows.
    allocator = filled(8 * MIB, 4 * MIB, 8 * MIB, capacity=40 * MIB)
    allocator.free(0)
    allocator.free(2)
    allocator.malloc(3, 12 * MIB)
    assert (allocator.retries, allocator.reserved) == (0, 40 * MIB)
    # 8 MiB at the start and 16 at the end are free, no page is: 24 MiB are there and 17 in a row are not.
    with pytest.raises(DeviceMemoryError, match="memory for a block of 17,825,792 bytes: it has 41,943,040, of which"):
        allocator.malloc(4, 17 * MIB)
    assert allocator.retries == 1
    allocator.malloc(4, 16 * MIB)
    assert allocator.reserved == 40 * MIB


def test_pages_of_one_pool_are_released_for_the_other() -> None:
    allocator = filled(30 * MIB, capacity=41 * MIB)
    with pytest.raises(DeviceMemoryError):
        allocator.malloc(1, 1)
    allocator.free(0)
    allocator.malloc(1, 1)
    assert allocator.usage() == Usage(512, 2 * MIB, 0)


# What torch's tests state


@pytest.mark.parametrize(
    ("size", "reserved", "reserved_by_the_last"),
    [
        (512, 2 * MIB, 2 * MIB),
        (MIB, 4 * MIB, 2 * MIB),
        (MIB + 512, 20 * MIB, 20 * MIB),
        (10 * MIB - 512, 40 * MIB, 40 * MIB),
        (10 * MIB + 512, 40 * MIB, 20 * MIB),
    ],
)
def test_torchs_test_of_segments_under_a_chain_of_operators(
    size: int, reserved: int, reserved_by_the_last: int
) -> None:
    """The cases of test_graph_memory_stats_and_use_result_after_destroy_graph in pytorch's test/test_cuda.py with its
    values for expandable segments; the chain is explained in test_cuda_allocator.py."""
    allocator = filled(size)
    last = 0
    for clone in range(1, 11, 2):
        allocator.malloc(clone, size)
        allocator.malloc(clone + 1, size)
        allocator.free(clone)
        allocator.free(last)
        last = clone + 1
    assert allocator.usage() == Usage(size, reserved, 0)
    allocator.release_cached()
    assert allocator.usage() == Usage(size, reserved_by_the_last, 0)


# Whatever is asked for


class NaivePages:
    """The same rules from two facts: which pages are mapped, and which bytes are used."""

    def __init__(self, small: bool) -> None:
        self.page = PAGES[small]
        self.mapped: set[int] = set()
        self.used: dict[int, tuple[int, int]] = {}

    def unmapped_runs(self) -> Iterator[tuple[int, int]]:
        start = 0
        for page in sorted(self.mapped):
            if page * self.page > start:
                yield start, page * self.page
            start = (page + 1) * self.page
        yield start, self.page * EXPANDABLE_PAGES

    def free_runs(self) -> list[tuple[int, int]]:
        """Stretches that are mapped and not used."""
        cuts = sorted([*self.unmapped_runs(), *self.used.values()])
        ends = [end for _, end in cuts]
        return [(low, high) for low, high in zip([0, *ends], [start for start, _ in cuts], strict=False) if low < high]

    def place_among_free(self, size: int) -> int | None:
        grows = dict(self.unmapped_runs())
        fits = sorted((high - low, low, high) for low, high in self.free_runs() if high - low >= size)
        rooms = [grows.get(high, high) - low for _, low, high in fits]
        chosen = 0
        while chosen + 1 < len(fits) and rooms[chosen + 1] < rooms[chosen]:
            chosen += 1
        return fits[chosen][1] if fits else None

    def place_to_grow(self, size: int) -> int:
        before = {high: low for low, high in self.free_runs()}
        for low, _ in self.unmapped_runs():
            start = before.get(low, low)
            limit = min([used for used, _ in self.used.values() if used >= start], default=self.page * EXPANDABLE_PAGES)
            if limit - start >= size:
                return start
        raise AssertionError

    def free_pages(self) -> set[int]:
        return {
            page
            for page in self.mapped
            if any(low <= page * self.page and (page + 1) * self.page <= high for low, high in self.free_runs())
        }


class NaiveGrowing:
    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.pools = {small: NaivePages(small) for small in (True, False)}

    def reserved(self) -> int:
        return sum(len(pool.mapped) * pool.page for pool in self.pools.values())

    def mapped_at(self, pool: NaivePages, size: int) -> int | None:
        start = pool.place_to_grow(size)
        for low, high in list(pool.unmapped_runs()):
            if start <= low < start + size:
                new = range(low // pool.page, -(-min(high, start + size) // pool.page))
                if self.capacity is not None and self.reserved() + len(new) * pool.page > self.capacity:
                    return None
                pool.mapped |= set(new)
        return start

    def malloc(self, handle: int, size: int) -> bool:
        size = -(-size // 512) * 512
        pool = self.pools[size <= MIB]
        start = pool.place_among_free(size)
        if start is None:
            start = self.mapped_at(pool, size)
        if start is None:
            self.release()
            start = self.mapped_at(pool, size)
        if start is None:
            return False
        pool.used[handle] = (start, start + size)
        return True

    def release(self) -> None:
        for pool in self.pools.values():
            pool.mapped -= pool.free_pages()

    def free(self, handle: int) -> None:
        for pool in self.pools.values():
            pool.used.pop(handle, None)


SIZES = st.one_of(
    st.sampled_from([512, 4096, 512 * KIB, MIB, 2 * MIB, 5 * MIB, 10 * MIB - 512, 10 * MIB, 15 * MIB, 20 * MIB]),
    st.integers(1, 2 * MIB),
    st.integers(1, 48 * MIB),
)
# Asks for a size, frees the n-th block in use (modulo their number), or releases cached segments.
STEP = st.one_of(
    st.tuples(st.just("malloc"), SIZES),
    st.tuples(st.just("free"), st.integers(0, 50)),
    st.tuples(st.just("release"), st.just(0)),
)
# Lists of a drawn length: left to itself, hypothesis makes them of five steps or so.
STEPS = st.integers(0, 60).flatmap(lambda length: st.lists(STEP, min_size=length, max_size=length))


@given(STEPS, st.one_of(st.none(), st.integers(0, 300 * MIB)))
def test_blocks_are_where_the_naive_model_has_them(steps: list[tuple[str, int]], capacity: int | None) -> None:
    allocator, naive = CachingAllocator(capacity, expandable=True), NaiveGrowing(capacity)
    asked: dict[int, int] = {}
    for handle, (verb, number) in enumerate(steps):
        if verb == "malloc":
            if naive.malloc(handle, number):
                allocator.malloc(handle, number)
                asked[handle] = number
            else:
                with pytest.raises(DeviceMemoryError):
                    allocator.malloc(handle, number)
        elif verb == "release":
            naive.release()
            allocator.release_cached()
        elif asked:
            gone = sorted(asked)[number % len(asked)]
            del asked[gone]
            naive.free(gone)
            allocator.free(gone)
        for small, pool in naive.pools.items():
            assert starts(allocator, small) == {handle: start for handle, (start, _) in pool.used.items()}
        rounded = sum(-(-size // 512) * 512 for size in asked.values())
        assert allocator.usage() == Usage(rounded, naive.reserved(), 0)
        assert sum(block.size for piece in allocator.snapshot() for block in piece) == allocator.reserved
        assert allocator.allocated <= allocator.reserved
    for handle in list(asked):
        allocator.free(handle)
    assert allocator.usage() == Usage(0, naive.reserved(), 0)
    allocator.release_cached()
    assert allocator.usage() == Usage(0, 0, 0) and allocator.snapshot() == []
