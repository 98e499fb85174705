"""Tests of the model of the caching allocator: each rule, torch's own test cases, and a second, naive model."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qlora_lite.errors import ConfigError, DeviceMemoryError, QLoRAError
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.planning.cuda_allocator import CachingAllocator, Replay, Usage, replay
from qlora_lite.planning.cuda_block_pools import BlockView

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Change(NamedTuple):
    phase: str | None
    serial: int
    delta: int


def filled(*sizes: int, capacity: int | None = None) -> CachingAllocator:
    """Returns an allocator with blocks of these sizes, under the handles 0, 1, 2, ..."""
    allocator = CachingAllocator(capacity)
    for handle, size in enumerate(sizes):
        allocator.malloc(handle, size)
    return allocator


def addresses(allocator: CachingAllocator) -> dict[int, int]:
    blocks = [block for segment in allocator.snapshot() for block in segment]
    return {block.handle: block.address for block in blocks if block.handle is not None}


# One rule after the other


@pytest.mark.parametrize(("size", "rounded"), [(1, 512), (512, 512), (513, 1024), (MIB - 1, MIB), (3 * MIB, 3 * MIB)])
def test_sizes_are_rounded_up_to_512_bytes(size: int, rounded: int) -> None:
    assert filled(size).allocated == rounded


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        # Rounded first: one byte more is a large block.
        (MIB + 1, 20 * MIB),
        # 512 bytes below the limit is the last size that shares, a byte more is rounded up to the limit.
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (GIB + 1, GIB + 2 * MIB),
    ],
)
def test_the_size_decides_about_the_segment(size: int, segment: int) -> None:
    assert filled(size).reserved == segment


def test_small_and_large_blocks_share_no_segment() -> None:
    # The large one leaves 18 MiB free, and the small ones still want a segment of their own.
    allocator = filled(2 * MIB, 512, 512)
    assert allocator.usage() == Usage(2 * MIB + 1024, 22 * MIB, 18 * MIB + (2 * MIB - 1024))


def test_a_small_rest_is_split_off_from_512_bytes() -> None:
    # 2 MiB - 512 bytes are more than a small block may have, so two of them fill all but the last 512 bytes.
    allocator = filled(MIB, MIB - 512)
    assert allocator.snapshot() == [
        [BlockView(0, MIB, 0), BlockView(MIB, MIB - 512, 1), BlockView(2 * MIB - 512, 512, None)]
    ]
    allocator.malloc(2, 1)
    assert allocator.usage() == Usage(2 * MIB, 2 * MIB, 0)


def test_a_large_rest_is_split_off_from_more_than_1_mib() -> None:
    # Of 12 MiB, 10.5 MiB leave 1.5 MiB: split. 11 MiB leave 1 MiB: kept, and counted as allocated.
    assert filled(10 * MIB + 512 * KIB).usage() == Usage(10 * MIB + 512 * KIB, 12 * MIB, 3 * MIB // 2)
    assert filled(11 * MIB).usage() == Usage(12 * MIB, 12 * MIB, 0)
    assert filled(11 * MIB - 512).usage() == Usage(11 * MIB - 512, 12 * MIB, MIB + 512)


def test_a_freed_block_is_cached_and_given_to_the_next_that_fits() -> None:
    allocator = filled(30 * MIB)
    allocator.free(0)
    # A whole free segment is cached, and no split block.
    assert allocator.usage() == Usage(0, 30 * MIB, 0)
    allocator.malloc(1, 29 * MIB)
    assert allocator.usage() == Usage(30 * MIB, 30 * MIB, 0)


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = filled(40 * MIB, 14 * MIB, 24 * MIB, 12 * MIB)
    starts = addresses(allocator)
    for handle in range(4):
        allocator.free(handle)
    allocator.malloc(4, 13 * MIB)
    allocator.malloc(5, 13 * MIB)
    allocator.malloc(6, 13 * MIB)
    # 14, then 24; its rest of 11 is too small, as is 12, so it is 40 then.
    assert [addresses(allocator)[handle] for handle in (4, 5, 6)] == [starts[1], starts[2], starts[0]]


def test_of_equal_blocks_the_one_at_the_lowest_address_is_taken() -> None:
    allocator = filled(*[2048] * 6)
    for handle in (3, 1, 5):
        allocator.free(handle)
    # Block 5 has merged with what follows it; 1 and 3 are equal.
    allocator.malloc(6, 2048)
    allocator.malloc(7, 2048)
    assert [addresses(allocator)[handle] // 2048 for handle in (6, 7)] == [1, 3]


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_free_neighbours_merge_in_whatever_order_they_are_freed(order: tuple[int, ...]) -> None:
    allocator = filled(6 * MIB, 6 * MIB, 6 * MIB)
    for handle in order:
        allocator.free(handle)
    assert allocator.snapshot() == [[BlockView(0, 20 * MIB, None)]]
    assert allocator.usage() == Usage(0, 20 * MIB, 0)


def test_blocks_of_different_segments_never_merge() -> None:
    allocator = filled(20 * MIB, 20 * MIB)
    allocator.free(0)
    allocator.free(1)
    allocator.malloc(2, 40 * MIB)
    assert allocator.usage() == Usage(40 * MIB, 80 * MIB, 0)


def test_holes_between_blocks_in_use_are_inactive_and_fit_nothing_larger() -> None:
    allocator = filled(4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB)
    allocator.free(1)
    allocator.free(3)
    assert allocator.usage() == Usage(12 * MIB, 20 * MIB, 8 * MIB)
    allocator.malloc(5, 5 * MIB)
    assert allocator.usage() == Usage(17 * MIB, 40 * MIB, 8 * MIB + 15 * MIB)


# Out of memory


def test_cached_segments_of_both_pools_are_released_before_memory_is_out() -> None:
    allocator = filled(30 * MIB, 512, 4 * MIB, capacity=52 * MIB)
    allocator.free(0)
    allocator.free(1)
    # 30 + 2 + 20 MiB are reserved: nothing is left. 30 and 2 are whole and free; that of 20 has a block in use.
    allocator.malloc(3, 32 * MIB)
    assert allocator.retries == 1
    assert allocator.usage() == Usage(36 * MIB, 52 * MIB, 16 * MIB)


def test_without_need_nothing_is_released() -> None:
    allocator = filled(30 * MIB, capacity=62 * MIB)
    allocator.free(0)
    allocator.malloc(1, 32 * MIB)
    assert (allocator.retries, allocator.reserved) == (0, 62 * MIB)


def test_memory_can_be_out_with_enough_bytes_free_in_holes() -> None:
    # 16 of 20 MiB are free, in a segment that a block keeps: no new segment of 12 MiB fits next to it.
    allocator = filled(8 * MIB, 4 * MIB, 8 * MIB, capacity=30 * MIB)
    allocator.free(0)
    allocator.free(2)
    with pytest.raises(DeviceMemoryError) as caught:
        allocator.malloc(3, 11 * MIB)
    assert str(caught.value) == (
        "the device is out of memory for a block of 11,534,336 bytes: "
        "it has 31,457,280, of which 20,971,520 are reserved (4,194,304 allocated); "
        "keep less alive at once, or use a device with more memory"
    )
    assert isinstance(caught.value, QLoRAError) and isinstance(caught.value, MemoryError)
    # It can still allocate from free blocks.
    allocator.malloc(3, 8 * MIB)
    assert addresses(allocator) == {1: 8 * MIB, 3: 0}


def test_peaks_stay_until_they_are_reset() -> None:
    allocator = filled(30 * MIB)
    allocator.free(0)
    allocator.release_cached()
    assert (allocator.usage(), allocator.peak()) == (Usage(0, 0, 0), Usage(30 * MIB, 30 * MIB, 0))
    allocator.reset_peaks()
    assert allocator.peak() == Usage(0, 0, 0)


# What torch's tests and sources state


@pytest.mark.parametrize(
    ("size", "segments", "reserved", "reserved_by_the_last"),
    [
        (512, 1, 2 * MIB, 2 * MIB),
        (MIB, 2, 4 * MIB, 2 * MIB),
        (MIB + 512, 1, 20 * MIB, 20 * MIB),
        (10 * MIB - 512, 2, 40 * MIB, 20 * MIB),
        (10 * MIB + 512, 3, 36 * MIB, 12 * MIB),
    ],
)
def test_torchs_test_of_segments_under_a_chain_of_operators(
    size: int, segments: int, reserved: int, reserved_by_the_last: int
) -> None:
    """The cases of test_graph_memory_stats_and_use_result_after_destroy_graph in pytorch's test/test_cuda.py:
    `b = a.clone()` and five times `b = b.clone() + 1` in a pool of its own, and the last b is kept."""
    allocator = CachingAllocator()
    allocator.malloc(0, size)
    last = 0
    for clone in range(1, 11, 2):
        allocator.malloc(clone, size)
        allocator.malloc(clone + 1, size)
        allocator.free(clone)
        allocator.free(last)
        last = clone + 1
    assert len(allocator.snapshot()) == segments
    assert allocator.reserved == reserved
    assert allocator.allocated == size
    allocator.release_cached()
    assert allocator.usage()[:2] == (size, reserved_by_the_last)


def test_torchs_test_of_the_default_settings() -> None:
    """test_allocator_settings in pytorch's test/test_cuda.py: 21 Mi floats are 84 MiB active, without rounding."""
    assert filled(21 * MIB * 4).usage() == Usage(84 * MIB, 84 * MIB, 0)


def test_torchs_test_of_a_retry_when_memory_is_out() -> None:
    """test_out_of_memory_retry in pytorch's test/test_cuda.py: two halves do not fit a device that has something on it;
    the second does when the first is gone."""
    total = 24 * GIB
    allocator = CachingAllocator(capacity=total - 500 * MIB)
    allocator.malloc(0, total // 2)
    with pytest.raises(DeviceMemoryError):
        allocator.malloc(1, total // 2)
    allocator.free(0)
    allocator.malloc(1, total // 2)
    assert allocator.reserved == total // 2


# Whatever is asked for

SIZES = st.one_of(
    st.sampled_from([512, 4096, 512 * KIB, MIB, 2 * MIB, 5 * MIB, 10 * MIB - 512, 10 * MIB, 11 * MIB, 20 * MIB]),
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


class NaiveAllocator:
    """The same rules with lists only: every search looks at every block, a freed segment is merged from scratch."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.segments: list[list[BlockView]] = []
        self.end = 0

    def reserved(self) -> int:
        return sum(block.size for segment in self.segments for block in segment)

    def malloc(self, handle: int, size: int) -> bool:
        size = max(512, (size + 511) // 512 * 512)
        small = size <= MIB
        fits = [
            (block.size, block.address, segment)
            for segment in self.segments
            for block in segment
            if block.handle is None and block.size >= size and small == (sum(b.size for b in segment) == 2 * MIB)
        ]
        if not fits:
            wanted = 2 * MIB if small else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
            if self.capacity is not None and self.reserved() + wanted > self.capacity:
                self.release()
                if self.reserved() + wanted > self.capacity:
                    return False
            self.segments.append([BlockView(self.end, wanted, None)])
            fits = [(wanted, self.end, self.segments[-1])]
            self.end += wanted
        has, address, segment = min(fits)
        rest = has - size
        used = size if rest >= (512 if small else MIB + 1) else has
        place = next(n for n, block in enumerate(segment) if block.address == address)
        free = [BlockView(address + used, has - used, None)] if used < has else []
        segment[place : place + 1] = [BlockView(address, used, handle), *free]
        return True

    def release(self) -> None:
        self.segments = [segment for segment in self.segments if any(block.handle is not None for block in segment)]

    def free(self, handle: int) -> None:
        for segment in self.segments:
            blocks = [block._replace(handle=None) if block.handle == handle else block for block in segment]
            segment.clear()
            for block in blocks:
                if segment and segment[-1].handle is None and block.handle is None:
                    segment[-1] = segment[-1]._replace(size=segment[-1].size + block.size)
                else:
                    segment.append(block)


def check_invariants(allocator: CachingAllocator, asked: dict[int, int]) -> None:
    segments = allocator.snapshot()
    blocks = [block for segment in segments for block in segment]
    in_use = {block.handle: block.size for block in blocks if block.handle is not None}
    assert in_use.keys() == asked.keys()
    # A block has what was asked for, and never more than the rest that is too small to split off.
    assert all(asked[handle] <= size <= asked[handle] + 511 + MIB for handle, size in in_use.items())
    assert allocator.allocated == sum(in_use.values())
    assert allocator.reserved == sum(block.size for block in blocks)
    assert 0 <= allocator.allocated <= allocator.reserved
    holes = [block.size for segment in segments if len(segment) > 1 for block in segment if block.handle is None]
    assert allocator.inactive_split == sum(holes)
    for segment in segments:
        starts = accumulate((block.size for block in segment[:-1]), initial=segment[0].address)
        assert [block.address for block in segment] == list(starts)
        assert not any(left.handle is None and right.handle is None for left, right in pairwise(segment))
    for below, above in pairwise(segments):
        assert below[-1].address + below[-1].size <= above[0].address


@given(STEPS, st.one_of(st.none(), st.integers(0, 200 * MIB)))
def test_blocks_tile_their_segments_and_are_those_of_the_naive_model(
    steps: list[tuple[str, int]], capacity: int | None
) -> None:
    allocator, naive = CachingAllocator(capacity), NaiveAllocator(capacity)
    asked: dict[int, int] = {}
    peak = allocator.usage()
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
        check_invariants(allocator, asked)
        assert allocator.snapshot() == naive.segments
        assert capacity is None or allocator.reserved <= capacity
        peak = peak.highest(allocator.usage())
    assert allocator.peak().allocated == peak.allocated and allocator.peak().inactive_split == peak.inactive_split
    assert allocator.peak().reserved == peak.reserved
    reserved = allocator.reserved
    for handle in list(asked):
        allocator.free(handle)
    assert allocator.usage() == Usage(0, reserved, 0)
    assert all(len(segment) == 1 for segment in allocator.snapshot())
    allocator.release_cached()
    assert allocator.usage() == Usage(0, 0, 0) and allocator.snapshot() == []


@given(st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.integers(0, 5), st.integers(0, 4 * MIB))))
def test_a_replay_is_the_same_every_time_and_as_the_calls_one_by_one(
    targets: list[tuple[str | None, int, int]],
) -> None:
    sizes = dict.fromkeys(range(6), 0)
    changes, allocator = [], CachingAllocator()
    for phase, serial, size in targets:
        old, sizes[serial] = sizes[serial], size
        changes.append(Change(phase, serial, size - old))
        if old and size and old != size:
            allocator.resize(serial, size)
        elif old and not size:
            allocator.free(serial)
        elif size and not old:
            allocator.malloc(serial, size)
    result = replay(changes)
    assert result == replay(iter(changes))
    assert (result.peak, result.end) == (allocator.peak(), allocator.usage())
    assert result.by_phase.keys() == {phase for phase, _, _ in targets}
    for entry in range(3):
        assert result.peak[entry] == max((usage[entry] for usage in result.by_phase.values()), default=0)


# Replays


def test_peaks_of_phases_include_their_start_and_are_joined_over_entries() -> None:
    changes = [
        Change(None, 0, 12 * MIB),
        Change("forward", 1, 20 * MIB),
        Change("forward", 4, 80 * MIB),
        Change("forward", 4, -80 * MIB),
        Change("backward", 2, 40 * MIB),
        Change("backward", 1, -20 * MIB),
        Change("backward", 2, -40 * MIB),
        Change("forward", 3, 14 * MIB),
    ]
    # The 40 MiB take the segment of 80 and leave 40 free in it. At last 14 MiB take that of 20 and leave 6.
    assert replay(changes) == Replay(
        peak=Usage(112 * MIB, 112 * MIB, 40 * MIB),
        by_phase={
            None: Usage(12 * MIB, 12 * MIB, 0),
            "forward": Usage(112 * MIB, 112 * MIB, 6 * MIB),
            "backward": Usage(72 * MIB, 112 * MIB, 40 * MIB),
        },
        end=Usage(26 * MIB, 112 * MIB, 6 * MIB),
        retries=0,
    )
    assert replay([]) == Replay(Usage(0, 0, 0), {}, Usage(0, 0, 0), 0)


@pytest.mark.parametrize("delta", [20 * MIB, -10 * MIB])
def test_a_resized_storage_has_its_old_and_its_new_block_for_a_moment(delta: int) -> None:
    changes = [Change(None, 0, 30 * MIB), Change(None, 0, delta), Change(None, 0, -30 * MIB - delta)]
    result = replay(changes)
    both = 30 * MIB + 30 * MIB + delta
    assert (result.peak, result.end) == (Usage(both, both, 0), Usage(0, both, 0))


def test_a_storage_resized_to_nothing_is_freed_and_can_grow_again() -> None:
    changes = [Change(None, 0, 30 * MIB), Change(None, 0, -30 * MIB), Change(None, 0, 30 * MIB), Change(None, 0, 0)]
    assert replay(changes).peak == Usage(30 * MIB, 30 * MIB, 0)


def test_a_replay_that_does_not_fit_names_the_phase() -> None:
    changes = [Change(None, 0, 20 * MIB), Change("forward", 1, 12 * MIB)]
    assert replay(changes, capacity=32 * MIB).peak.reserved == 32 * MIB
    with pytest.raises(
        DeviceMemoryError, match=r"^in phase 'forward', the device is out of memory for a block of 12,58"
    ):
        replay(changes, capacity=32 * MIB - 1)
    with pytest.raises(DeviceMemoryError, match=r"^outside of all phases, the device is out of memory"):
        replay(changes, capacity=0)


def test_a_replay_can_have_expandable_segments() -> None:
    # 12, 14 and 16 MiB: segments of their own, or three pages of 20 MiB that 42 MiB lie in.
    changes = [Change(None, serial, size * MIB) for serial, size in enumerate((12, 14, 16))]
    assert replay(changes).peak == Usage(42 * MIB, 42 * MIB, 0)
    assert replay(changes, expandable=True).peak == Usage(42 * MIB, 60 * MIB, 0)


def test_a_replay_counts_its_retries() -> None:
    changes = [Change(None, 0, 20 * MIB), Change(None, 0, -20 * MIB), Change(None, 1, 22 * MIB)]
    result = replay(changes, capacity=24 * MIB)
    assert (result.retries, result.peak) == (1, Usage(22 * MIB, 22 * MIB, 0))


def test_a_traced_step_allocates_its_rounded_storages_in_every_phase() -> None:
    model = nn.Sequential(nn.Linear(64, 700), nn.GELU(), nn.Linear(700, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    with StorageTrace() as trace:
        with trace.phase("forward"):
            loss = model(torch.ones(90, 64)).square().mean()
        with trace.phase("backward"):
            loss.backward()
        with trace.phase("optimizer"):
            optimizer.step()
    # Nothing here has more than 1 MiB, and small blocks have no more than their rounding.
    rounded, sizes = 0, dict.fromkeys((event.serial for event in trace.timeline()), 0)
    most = dict.fromkeys(trace.phases(), 0)
    for event in trace.timeline():
        size = sizes[event.serial] + event.delta
        rounded += -(-size // 512) * 512 - -(-sizes[event.serial] // 512) * 512
        sizes[event.serial] = size
        most[event.phase or ""] = max(most[event.phase or ""], rounded)
    result = replay(trace.timeline())
    assert {phase: usage.allocated for phase, usage in result.by_phase.items()} == most
    assert result.peak.allocated > trace.peak()[0] and result.end.allocated == rounded
    assert all(usage.reserved % (2 * MIB) == 0 for usage in result.by_phase.values())


# Mistakes


def test_invalid_calls_are_refused() -> None:
    allocator = filled(512)
    with pytest.raises(ConfigError, match="handle 0 already has a block; free it first, or resize it"):
        allocator.malloc(0, 512)
    with pytest.raises(ConfigError, match="handle 7 has no block; allocate one first"):
        allocator.free(7)
    with pytest.raises(ConfigError, match="handle 7 has no block; allocate one first"):
        allocator.resize(7, 512)
    with pytest.raises(ConfigError, match="a block must have at least 1 byte; got 0 for handle 1"):
        allocator.malloc(1, 0)
    with pytest.raises(ConfigError, match="capacity must be a number of bytes, or None for no limit; got -1"):
        CachingAllocator(capacity=-1)
    assert allocator.usage() == Usage(512, 2 * MIB, 2 * MIB - 512)
    lost = [Change(None, 0, 512), Change(None, 0, -513)]
    with pytest.raises(ConfigError, match="storage 0 has 512 bytes and cannot lose 513; replay a trace from its start"):
        replay(lost)
