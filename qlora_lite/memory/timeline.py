"""Downsamples the events of a trace to the points that a picture has room for, without losing a peak."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.report import Timeline
from qlora_lite.memory.trace import TraceEvent

DEFAULT_POINTS = 600
CATEGORIES = tuple(Category)


def downsample(events: Iterable[TraceEvent], points: int = DEFAULT_POINTS) -> Timeline:
    """Returns the timeline, in bytes, of the events of a run as `StorageTrace.timeline()` yields them.

    The events are cut where the phase changes, and each part into stretches of about equal length. A stretch becomes
    one point: the first of its largest moments, its start included. The peak of the run, and that of every phase with
    an event in it, are therefore points. There are at most `points` of them, and one more for each part.

    Raises ConfigError for less than one point.
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise ConfigError(f"a timeline needs 1 point or more; got {points!r}")
    index = {category: number for number, category in enumerate(CATEGORIES)}
    # 17 bytes per event instead of the event itself. live[i] is the state after i events.
    live, deltas, categories = array("q", (0,)), array("q"), array("b")
    starts: list[int] = []
    phases: list[str | None] = []
    for phase, _, delta, after, category, _ in events:
        if not phases or phases[-1] != phase:
            starts.append(len(deltas))
            phases.append(phase)
        live.append(after)
        deltas.append(delta)
        categories.append(index[category])
    chosen: list[int] = []
    names: list[str | None] = []
    ends = [*starts, len(deltas)][1:]
    for name, start, end in zip(phases, starts, ends, strict=True):
        for first, last in _stretches(start, end, len(deltas), points):
            part = live[first : last + 1]
            chosen.append(first + part.index(max(part)))
            names.append(name)
    columns = zip(*_states(deltas, categories, chosen), strict=True) if chosen else ((),) * len(CATEGORIES)
    return Timeline(tuple(names), {key: tuple(column) for key, column in zip(CATEGORIES, columns, strict=True)})


def _stretches(start: int, end: int, events: int, points: int) -> Iterator[tuple[int, int]]:
    """Cuts start..end into its share of all points; yields (first state, last state) of each stretch."""
    length = end - start
    pieces = max(1, min(length, length * points // events))
    for piece in range(pieces):
        yield start + length * piece // pieces, start + length * (piece + 1) // pieces


def _states(deltas: Iterable[int], categories: Iterable[int], positions: list[int]) -> Iterator[tuple[int, ...]]:
    """Yields the bytes of each category after these numbers of events, which must ascend."""
    sizes = [0] * len(CATEGORIES)
    changes = zip(deltas, categories, strict=True)
    done = 0
    for position in positions:
        for _ in range(position - done):
            delta, category = next(changes)
            sizes[category] += delta
        done = position
        yield tuple(sizes)
