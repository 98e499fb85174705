"""Bytes of modules as nested rectangles: each as large as its bytes, all of them together the whole.

Layout: squarified treemaps (Bruls, Huizing, van Wijk 2000). Items are laid in rows along the shorter side of what is
left, and a row takes one more item as long as its worst ratio of sides does not get worse. Repeated blocks, which
are modules named by numbers, are laid in even rows from left to right, in their order, so that they read like lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category, MemoryBreakdown

NO_MODULE = "no module"
ITSELF = "the model itself"
# An adapted layer holds the layer that it adapts under this name; the two are one layer to the reader.
WRAPPED = "base_layer"
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Rectangle:
    """A place, in any unit of length."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Tile:
    """A rectangle of the picture. depth: 0 for the whole. category: None for a group, whose tiles follow it.

    is_split: whether the modules inside a group follow, or only its categories.
    """

    path: str
    depth: int
    category: Category | None
    size: int
    is_split: bool
    rectangle: Rectangle


@dataclass
class _Node:
    path: str
    own: dict[Category, int] = field(default_factory=dict)
    children: dict[str, _Node] = field(default_factory=dict)
    sizes: dict[Category, int] = field(default_factory=lambda: dict.fromkeys(Category, 0))

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def pattern(module: str) -> str:
    """A module's path with its block's number left open: `layers.3.mlp` -> `layers.*.mlp`."""
    return NUMBER.sub("*", module)


def group_repeated(breakdown: MemoryBreakdown) -> dict[str | None, tuple[int, dict[Category, int]]]:
    """For each pattern of module paths, the largest first: how many modules there are, and their bytes by category."""
    modules: dict[str | None, set[str | None]] = {}
    sizes: dict[str | None, dict[Category, int]] = {}
    for (category, module), size in breakdown.items():
        path = None if module is None else ".".join(_parts(module))
        key = None if path is None else pattern(path)
        modules.setdefault(key, set()).add(path)
        sums = sizes.setdefault(key, dict.fromkeys(Category, 0))
        sums[category] += size
    order = sorted(sizes, key=lambda key: -sum(sizes[key].values()))
    return {key: (len(modules[key]), sizes[key]) for key in order}


def squarify(sizes: Sequence[int], place: Rectangle) -> list[Rectangle]:
    """Rectangles that tile `place`, in the order of the sizes and as large as they say. Sizes are above 0."""
    made: list[Rectangle] = []
    left, rest = place, sum(sizes)
    while len(made) < len(sizes):
        lies = left.width <= left.height
        along = left.width if lies else left.height
        row = _row(sizes[len(made) :], along, left.width * left.height / rest)
        rectangles, left = _laid_row(row, rest, left, lies)
        made += rectangles
        rest -= sum(row)
    return made


def even_rows(sizes: Sequence[int], place: Rectangle) -> list[Rectangle]:
    """The same, row below row with about as many items in each; so many rows that the worst ratio of sides is best."""
    count = len(sizes)

    def laid(rows: int) -> list[Rectangle]:
        made: list[Rectangle] = []
        left, rest = place, sum(sizes)
        for number in range(rows):
            row = sizes[count * number // rows : count * (number + 1) // rows]
            rectangles, left = _laid_row(row, rest, left, True)
            made += rectangles
            rest -= sum(row)
        return made

    return min((laid(rows) for rows in range(1, count + 1)), key=lambda made: max(map(_ratio, made)))


def _ratio(place: Rectangle) -> float:
    return max(place.width, place.height) / min(place.width, place.height)


def _laid_row(row: Sequence[int], rest: int, left: Rectangle, lies: bool) -> tuple[list[Rectangle], Rectangle]:
    """The rectangles of one row, at the upper or left side of what is left, and what is left then."""
    total, made, done = sum(row), [], 0
    along, across = (left.width, left.height) if lies else (left.height, left.width)
    thick = across if total == rest else across * total / rest
    for size in row:
        start, length = along * done / total, along * size / total
        done += size
        if lies:
            made.append(Rectangle(left.x + start, left.y, length, thick))
        else:
            made.append(Rectangle(left.x, left.y + start, thick, length))
    if lies:
        return made, Rectangle(left.x, left.y + thick, left.width, left.height - thick)
    return made, Rectangle(left.x + thick, left.y, left.width - thick, left.height)


def _row(sizes: Sequence[int], along: float, area: float) -> Sequence[int]:
    """The items that make the next row; `area` is that of one byte."""
    total = smallest = largest = sizes[0]
    worst = _worst(total, smallest, largest, along, area)
    for count, size in enumerate(sizes[1:], start=1):
        smallest, largest = min(smallest, size), max(largest, size)
        ratio = _worst(total + size, smallest, largest, along, area)
        if ratio > worst:
            return sizes[:count]
        total, worst = total + size, ratio
    return sizes


def _worst(total: int, smallest: int, largest: int, along: float, area: float) -> float:
    """The largest ratio of the sides of a row's rectangles."""
    thick = total * area / along
    return max(largest * area / thick**2, thick**2 / (smallest * area))


def tiles(breakdown: MemoryBreakdown, place: Rectangle, smallest_side: float) -> Iterator[Tile]:
    """Groups and the tiles inside them, from the outside in; the tiles that have a category tile the place.

    A group whose shorter side is below `smallest_side` is split by category, not by module, and so is every module
    that has none inside; repeated blocks all alike. Raises ConfigError for sizes below 0, which have no area.
    """
    if any(size < 0 for size in breakdown.values()):
        raise ConfigError("a treemap shows bytes, and some of this breakdown are below 0; it must not be a difference")
    root = _tree(breakdown)
    if root.total:
        totals: dict[str, int] = {}
        _add_up(root, totals)
        yield from _tiles_of(root, 0, place, bool(root.children), smallest_side, totals)


def _parts(module: str) -> list[str]:
    parts = module.split(".")
    return parts[: parts.index(WRAPPED)] if WRAPPED in parts[1:] else parts


def _tree(breakdown: MemoryBreakdown) -> _Node:
    root = _Node("")
    for (category, module), size in breakdown.items():
        node = root
        node.sizes[category] += size
        for part in [NO_MODULE] if module is None else _parts(module) if module else []:
            path = f"{node.path}.{part}" if node.path else part
            node = node.children.setdefault(part, _Node(path))
            node.sizes[category] += size
        node.own[category] = node.own.get(category, 0) + size
    return root


def _add_up(node: _Node, totals: dict[str, int]) -> None:
    """Bytes of each pattern: blocks that differ a little still have their modules in one order."""
    key = pattern(node.path)
    totals[key] = totals.get(key, 0) + node.total
    for child in node.children.values():
        _add_up(child, totals)


def _tiles_of(
    node: _Node, depth: int, place: Rectangle, is_split: bool, smallest_side: float, totals: dict[str, int]
) -> Iterator[Tile]:
    yield Tile(node.path, depth, None, node.total, is_split, place)
    sizes = node.own if is_split else node.sizes
    own = sorted(((key, sizes[key]) for key in Category if sizes.get(key)), key=lambda item: -item[1])
    inner = sorted(node.children.values(), key=lambda child: _place_in_order(child, totals)) if is_split else []
    numbered = bool(inner) and all(name.isdecimal() for name in node.children)
    lay = even_rows if numbered else squarify
    rectangles = lay([*(child.total for child in inner), *(size for _, size in own)], place)
    sides = [min(rectangle.width, rectangle.height) for rectangle in rectangles[: len(inner)]]
    # Blocks are split all or none, by the one in the middle: they are to look alike.
    sides = [median_low(sides)] * len(sides) if numbered else sides
    for child, rectangle, side in zip(inner, rectangles, sides, strict=False):
        # A group that is nothing but the one group inside it goes by the name of that one.
        split = bool(child.children) and (side >= smallest_side or (len(child.children) == 1 and not child.own))
        yield from _tiles_of(child, depth + 1, rectangle, split, smallest_side, totals)
    for (category, size), rectangle in zip(own, rectangles[len(inner) :], strict=True):
        yield Tile(node.path, depth + 1, category, size, False, rectangle)


def _place_in_order(node: _Node, totals: dict[str, int]) -> tuple[int, int]:
    name = node.path.rpartition(".")[2]
    return -totals[pattern(node.path)], int(name) if name.isdecimal() else 0
