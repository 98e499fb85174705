"""The peaks of a model with many layers from those of two models with few.

Between two events of a run lie the same allocations whatever the number of layers, so what is alive at a given event
of a given layer (the first two and the last two, counted from their end) is a straight line over the number of layers.
The peak of a phase is the highest of all these lines, which need not be one line: with few layers the loss may be the
peak, with many a block. So each place is continued by itself, and the highest is looked for afterwards. Layers in the
middle lie between those at the ends. All of this holds for layers that are alike; whoever uses it compares with a
third number of layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.trace import TraceEvent

# Layers with a place of their own, at each end.
AT_ENDS = 2
_LAYER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


class Place(NamedTuple):
    """Where in a run something was allocated: the phase, what for, and by which module, its layer counted from the
    nearer end (-1 is the last). module is None, and category too, for the beginning of a phase."""

    phase: str | None
    category: Category | None
    module: str | None


# Bytes of each Category, in its order.
Sizes = tuple[int, ...]


def _names(module: str | None, layers: int) -> Iterator[str | None]:
    """The module's name with the number of its layer counted from either end; none for layers in the middle."""
    found = None if module is None else _LAYER.search(module)
    if module is None or found is None:
        yield module
        return
    number = int(found[0])
    for relative in (number, number - layers):
        if -AT_ENDS <= relative < AT_ENDS:
            yield f"{module[: found.start()]}{relative}{module[found.end() :]}"


def highest_levels(events: Iterable[TraceEvent], layers: int) -> dict[Place, Sizes]:
    """The most that was alive at each place of a run of a model with so many layers, by category."""
    order = {category: number for number, category in enumerate(Category)}
    now, most, found = [0] * len(order), dict[Place, int](), dict[Place, Sizes]()
    names: dict[str | None, list[str | None]] = {}
    phase, live = None, 0

    def note(place: Place) -> None:
        if live > most.get(place, -1):
            most[place], found[place] = live, tuple(now)

    for event in events:
        if event.phase != phase:
            phase = event.phase
            note(Place(phase, None, None))
        now[order[event.category]] += event.delta
        live = event.live
        if event.delta > 0:
            if event.module not in names:
                names[event.module] = list(_names(event.module, layers))
            for name in names[event.module]:
                note(Place(phase, event.category, name))
    return found


def continued(few: dict[Place, Sizes], more: dict[Place, Sizes], steps: int) -> dict[Place, Sizes]:
    """The levels with `steps` layers more than `few`, of which `more` has one more."""
    return {
        place: tuple(size + (more[place][number] - size) * steps for number, size in enumerate(sizes))
        for place, sizes in few.items()
        if place in more
    }


def peaks(levels: dict[Place, Sizes]) -> dict[str | None, tuple[Place, Sizes]]:
    """The highest level of each phase, in the order of the phases."""
    found: dict[str | None, tuple[Place, Sizes]] = {}
    for place, sizes in levels.items():
        if place.phase not in found or sum(sizes) > sum(found[place.phase][1]):
            found[place.phase] = place, sizes
    return found


def layer_named(module: str | None, layers: int) -> str | None:
    """A place's module under its own name, in a model with so many layers."""
    if module is None:
        return None
    return re.sub(r"(?:^|(?<=\.))-\d+(?=\.|$)", lambda found: str(layers + int(found[0])), module, count=1)
