"""Extrapolates the memory peaks of a model with many layers from those of two models with few.

The same allocations lie between two events of a run whatever the number of layers. The bytes alive at a given event of
a given layer (one of the first two, or one of the last two counted from the end) are therefore a straight line over the
number of layers. The peak of a phase is the highest of all these lines, and not one line itself: with few layers the
loss may be the peak, with many layers a block. So every allocation site is extrapolated by itself, and the highest is
selected afterwards. Layers in the middle lie between those at the ends.

All of this holds for layers that are alike, which the caller verifies with a third number of layers (forecast.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.trace import TraceEvent

# The number of layers at each end that have allocation sites of their own.
EDGE_LAYERS = 2
_LAYER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


class AllocationSite(NamedTuple):
    """Where in a run bytes were allocated: the phase, their category, and the module that allocated them.

    The number of the module's layer is counted from the nearer end, so -1 is the last layer. At the start of a phase
    category and module are None.
    """

    phase: str | None
    category: Category | None
    module: str | None


# The bytes of each category, in the order of Category.
CategorySizes = tuple[int, ...]
# The most bytes alive at each allocation site, split by category.
SiteLevels = dict[AllocationSite, CategorySizes]


def _relative_names(module: str | None, layers: int) -> Iterator[str | None]:
    """Yields the module's name with the number of its layer counted from either end; none for a layer in the middle."""
    found = None if module is None else _LAYER.search(module)
    if module is None or found is None:
        yield module
        return
    number = int(found[0])
    for relative in (number, number - layers):
        if -EDGE_LAYERS <= relative < EDGE_LAYERS:
            yield f"{module[: found.start()]}{relative}{module[found.end() :]}"


def highest_by_site(events: Iterable[TraceEvent], layers: int) -> SiteLevels:
    """Returns the most bytes alive at each allocation site of a run, whose model has this many layers."""
    index = {category: number for number, category in enumerate(Category)}
    now, most, found = [0] * len(index), dict[AllocationSite, int](), SiteLevels()
    names: dict[str | None, list[str | None]] = {}
    phase, live = None, 0

    def note(site: AllocationSite) -> None:
        if live > most.get(site, -1):
            most[site], found[site] = live, tuple(now)

    for event in events:
        if event.phase != phase:
            phase = event.phase
            note(AllocationSite(phase, None, None))
        now[index[event.category]] += event.delta
        live = event.live
        if event.delta > 0:
            if event.module not in names:
                names[event.module] = list(_relative_names(event.module, layers))
            for name in names[event.module]:
                note(AllocationSite(phase, event.category, name))
    return found


def extrapolate(few: SiteLevels, one_more: SiteLevels, extra_layers: int) -> SiteLevels:
    """Returns the levels with `extra_layers` layers more than `few` has; `one_more` has one more.

    level(n) = few + (one_more - few) * extra_layers, for each site and category.
    """
    return {
        site: tuple(size + (one_more[site][number] - size) * extra_layers for number, size in enumerate(sizes))
        for site, sizes in few.items()
        if site in one_more
    }


def phase_peaks(levels: SiteLevels) -> dict[str | None, tuple[AllocationSite, CategorySizes]]:
    """Returns the highest level of each phase and its site, in the order of the phases."""
    found: dict[str | None, tuple[AllocationSite, CategorySizes]] = {}
    for site, sizes in levels.items():
        if site.phase not in found or sum(sizes) > sum(found[site.phase][1]):
            found[site.phase] = site, sizes
    return found


def absolute_name(module: str | None, layers: int) -> str | None:
    """Returns the name of a site's module in a model with this many layers: `layers.-1` -> `layers.31`."""
    if module is None:
        return None
    return re.sub(r"(?:^|(?<=\.))-\d+(?=\.|$)", lambda found: str(layers + int(found[0])), module, count=1)
