"""Tests of the timeline of live bytes."""

from __future__ import annotations

from itertools import accumulate, groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.timeline import downsample
from qlora_lite.memory.trace import StorageTrace, TraceEvent

CATEGORIES = tuple(Category)
NAMES = (None, "forward", "backward")


@st.composite
def runs(draw: st.DrawFn) -> list[TraceEvent]:
    """Storages created and freed at random moments in random phases."""
    live: list[tuple[int, int, Category]] = []
    phase, total, serial, events = None, 0, 0, []
    for _ in range(draw(st.integers(0, 60))):
        phase = draw(st.sampled_from((phase, phase, *NAMES)))
        if live and draw(st.booleans()):
            gone, size, category = live.pop(draw(st.integers(0, len(live) - 1)))
            delta = -size
        else:
            gone, delta, category = serial, draw(st.integers(1, 1 << 40)), draw(st.sampled_from(CATEGORIES))
            live.append((gone, delta, category))
            serial += 1
        total += delta
        events.append(TraceEvent(phase, gone, delta, total, category, None))
    return events


def states(events: list[TraceEvent]) -> list[tuple[int, ...]]:
    """Returns the bytes of each category after 0, 1, 2, ... events."""
    columns = ([e.delta if e.category is key else 0 for e in events] for key in CATEGORIES)
    return list(zip(*(accumulate(column, initial=0) for column in columns), strict=True))


@given(runs(), st.integers(1, 80))
def test_every_point_is_a_state_of_the_run_and_no_peak_is_lost(events: list[TraceEvent], points: int) -> None:
    timeline = downsample(events, points)
    shown = list(zip(*timeline.sizes.values(), strict=True))
    was = states(events)
    parts = [list(part) for _, part in groupby(range(len(events)), key=lambda number: events[number].phase)]

    assert set(timeline.sizes) == set(CATEGORIES) and len(shown) == len(timeline) <= points + len(parts)
    later = iter(was)
    assert all(point in later for point, _ in groupby(shown))
    assert [name for name, _ in groupby(timeline.phases)] == [events[part[0]].phase for part in parts]
    for name in {event.phase for event in events}:
        # A phase starts with what was alive before its first change.
        moments = [m for part in parts if events[part[0]].phase == name for m in range(part[0], part[-1] + 2)]
        peak = max(sum(was[moment]) for moment in moments)
        assert max(sum(p) for p, where in zip(shown, timeline.phases, strict=True) if where == name) == peak


def test_a_point_is_the_largest_of_its_stretch() -> None:
    sizes = [1, 2, 3, -2, 5, -4, 1, 1]  # alive: 1 3 6 4 9 5 6 7
    events = [
        TraceEvent("step", 0, delta, live, Category.ACTIVATION, None)
        for delta, live in zip(sizes, accumulate(sizes), strict=True)
    ]
    assert downsample(events, 4).sizes[Category.ACTIVATION] == (3, 6, 9, 7)
    assert downsample(events, 1).sizes[Category.ACTIVATION] == (9,)
    assert downsample(events, 100).sizes[Category.ACTIVATION] == (1, 3, 6, 6, 9, 9, 6, 7)
    assert downsample(events, 4).phases == ("step",) * 4


def test_the_timeline_of_a_real_step_has_the_peaks_of_its_trace() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    trace = StorageTrace()
    with trace:
        for _ in range(3):
            with trace.phase("forward"):
                loss = model(torch.randn(32, 16)).square().mean()
            with trace.phase("backward"):
                loss.backward()
            del loss
    timeline = downsample(trace.timeline(), points=5)
    total = [sum(point) for point in zip(*timeline.sizes.values(), strict=True)]
    peak, breakdown = trace.peak()
    at = total.index(max(total))
    assert total[at] == peak
    assert {key: column[at] for key, column in timeline.sizes.items()} == breakdown.by_category()
    for name in ("forward", "backward"):
        assert max(t for t, where in zip(total, timeline.phases, strict=True) if where == name) == trace.peak(name)[0]


def test_no_events_give_no_points() -> None:
    timeline = downsample([])
    assert len(timeline) == 0 and timeline.sizes == dict.fromkeys(Category, ())


@pytest.mark.parametrize("points", [0, -1, 2.5, True])
def test_less_than_one_point_is_refused(points: object) -> None:
    with pytest.raises(ConfigError, match=r"a timeline needs 1 point or more; got "):
        downsample([], points)  # type: ignore[arg-type]
