"""Times the alternatives of each choice, and chooses.

The alternatives of a key take turns, so that a busy moment meets all of them, and the shortest time of each counts. The
default stays unless another takes less than `WORTHWHILE` of its time: small differences are noise, and all machines
that show no large ones compute the same numbers. A machine that others keep busy shows nothing, so times from it are
dropped: if all takes longer than `MOST_SECONDS`, or this thread had a core for less than `OWN_SHARE` of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch.utils._mode_utils import no_dispatch

from qlora_lite.choices import DEFAULTS, Choices
from qlora_lite.choosing.timed_work import Work, timed_work


class Clocks(NamedTuple):
    """wall: seconds that pass. own: seconds that this thread has computed."""

    wall: Callable[[], float] = time.perf_counter
    own: Callable[[], float] = time.thread_time


CLOCKS = Clocks()
WORTHWHILE = 0.9
OWN_SHARE = 0.6
# Turns of the alternatives of a key, the first as warm-up: until they took this long, but not fewer or more than these.
KEY_SECONDS = 0.06
LEAST_TURNS, MOST_TURNS = 3, 8
MOST_SECONDS = 1.8

Seconds = Mapping[str, Mapping[str, float]]  # of each alternative, by key


def _seconds(works: Mapping[str, Work], clock: Callable[[], float], until: float) -> dict[str, float] | None:
    """Returns the shortest time of each alternative, its first turn left out; None if it was not found in time."""
    shortest = dict.fromkeys(works, float("inf"))
    began = clock()
    for turn in range(MOST_TURNS):
        for name, work in works.items():
            start = clock()
            work()
            if turn > 0:
                shortest[name] = min(shortest[name], clock() - start)
            if clock() > until:
                return None
        if turn + 1 >= LEAST_TURNS and clock() - began > KEY_SECONDS:
            break
    return shortest


def fastest(seconds: Mapping[str, float]) -> str:
    """Returns the alternative that is chosen for these times; the first is the default."""
    default = next(iter(seconds))
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] < WORTHWHILE * seconds[default] else default


def fastest_of_all(seconds: Seconds) -> Choices:
    """Returns the choice for each key; the default where there are no times."""
    return {**DEFAULTS, **{key: fastest(own) for key, own in seconds.items()}}


def measure(
    dtype: str, works: Iterable[tuple[str, Mapping[str, Work]]] | None = None, clocks: Clocks = CLOCKS
) -> Seconds | None:
    """Returns the times of the alternatives for a dtype, with the threads that torch has now; None on a busy machine.

    works: pairs of a key and the functions to be timed; None: those of `timed_work`. Runs on real tensors also within
    a rehearsal, whose modes do not see it. Random states stay as they are.
    """
    began, own, seconds = clocks.wall(), clocks.own(), {}
    with no_dispatch(), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for key, alternatives in timed_work(dtype) if works is None else works:
            found = _seconds(alternatives, clocks.wall, began + MOST_SECONDS)
            if found is None:
                return None
            seconds[key] = found
    is_quiet = clocks.own() - own >= OWN_SHARE * (clocks.wall() - began)
    return seconds if is_quiet else None
