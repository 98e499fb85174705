"""Lays out the bytes of modules as a treemap: nested rectangles whose areas are proportional to bytes.

The layout is that of squarified treemaps (Bruls, Huizing, van Wijk 2000). Items are placed in rows along the shorter
side of the remaining area. A row takes one more item as long as its worst aspect ratio does not get worse. Repeated
blocks, which are modules named by numbers, are placed in even rows from left to right, in order, like text.
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
# An adapted layer holds the original layer under this name. The picture shows the two as one layer.
BASE_LAYER = "base_layer"
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Rectangle:
    """A rectangle, in any unit of length."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Tile:
    """A rectangle of the picture. depth: 0 for the whole picture. category: None for a group, whose tiles follow it.

    is_split: whether the tiles of a group are modules and categories, or categories only.
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
    """Returns a module path with `*` for the number of its block: `layers.3.mlp` -> `layers.*.mlp`."""
    return NUMBER.sub("*", module)


def group_repeated(breakdown: MemoryBreakdown) -> dict[str | None, tuple[int, dict[Category, int]]]:
    """Returns, for each pattern of module paths, the number of modules and their bytes by category, largest first."""
    modules: dict[str | None, set[str | None]] = {}
    sizes: dict[str | None, dict[Category, int]] = {}
    for (category, module), size in breakdown.items():
        path = None if module is None else ".".join(_shown_parts(module))
        key = None if path is None else pattern(path)
        modules.setdefault(key, set()).add(path)
        sums = sizes.setdefault(key, dict.fromkeys(Category, 0))
        sums[category] += size
    order = sorted(sizes, key=lambda key: -sum(sizes[key].values()))
    return {key: (len(modules[key]), sizes[key]) for key in order}


def squarify(sizes: Sequence[int], area: Rectangle) -> list[Rectangle]:
    """Returns rectangles that tile `area`, proportional to the sizes (all above 0) and in their order."""
    made: list[Rectangle] = []
    left, rest = area, sum(sizes)
    while len(made) < len(sizes):
        is_horizontal = left.width <= left.height
        along = left.width if is_horizontal else left.height
        row = _row(sizes[len(made) :], along, left.width * left.height / rest)
        rectangles, left = _place_row(row, rest, left, is_horizontal)
        made += rectangles
        rest -= sum(row)
    return made


def even_rows(sizes: Sequence[int], area: Rectangle) -> list[Rectangle]:
    """Like `squarify`, in rows with about equally many items, as many rows as make the worst aspect ratio smallest."""
    count = len(sizes)

    def arranged(rows: int) -> list[Rectangle]:
        made: list[Rectangle] = []
        left, rest = area, sum(sizes)
        for number in range(rows):
            row = sizes[count * number // rows : count * (number + 1) // rows]
            rectangles, left = _place_row(row, rest, left, True)
            made += rectangles
            rest -= sum(row)
        return made

    return min((arranged(rows) for rows in range(1, count + 1)), key=lambda made: max(map(_ratio, made)))


def _ratio(area: Rectangle) -> float:
    return max(area.width, area.height) / min(area.width, area.height)


def _place_row(
    row: Sequence[int], rest: int, left: Rectangle, is_horizontal: bool
) -> tuple[list[Rectangle], Rectangle]:
    """Returns the rectangles of one row, at the top or left of the area that is left, and the area left then."""
    total, made, done = sum(row), [], 0
    along, across = (left.width, left.height) if is_horizontal else (left.height, left.width)
    thick = across if total == rest else across * total / rest
    for size in row:
        start, length = along * done / total, along * size / total
        done += size
        if is_horizontal:
            made.append(Rectangle(left.x + start, left.y, length, thick))
        else:
            made.append(Rectangle(left.x, left.y + start, thick, length))
    if is_horizontal:
        return made, Rectangle(left.x, left.y + thick, left.width, left.height - thick)
    return made, Rectangle(left.x + thick, left.y, left.width - thick, left.height)


def _row(sizes: Sequence[int], along: float, byte_area: float) -> Sequence[int]:
    """Returns the items of the next row; `byte_area` is the area of one byte."""
    total = smallest = largest = sizes[0]
    worst = _worst(total, smallest, largest, along, byte_area)
    for count, size in enumerate(sizes[1:], start=1):
        smallest, largest = min(smallest, size), max(largest, size)
        ratio = _worst(total + size, smallest, largest, along, byte_area)
        if ratio > worst:
            return sizes[:count]
        total, worst = total + size, ratio
    return sizes


def _worst(total: int, smallest: int, largest: int, along: float, byte_area: float) -> float:
    """Returns the largest aspect ratio in a row."""
    thick = total * byte_area / along
    return max(largest * byte_area / thick**2, thick**2 / (smallest * byte_area))


def tiles(breakdown: MemoryBreakdown, area: Rectangle, smallest_side: float) -> Iterator[Tile]:
    """Yields groups and the tiles inside them, from the outside in. The tiles with a category cover `area`.

    A group whose shorter side is below `smallest_side` is split by category only, as is every module without modules
    inside. Repeated blocks are all split alike. Raises ConfigError for sizes below 0, which have no area.
    """
    if any(size < 0 for size in breakdown.values()):
        raise ConfigError("a treemap cannot show sizes below 0; got a breakdown that is a difference of two")
    root = _tree(breakdown)
    if root.total:
        totals: dict[str, int] = {}
        _add_up(root, totals)
        yield from _tiles_of(root, 0, area, bool(root.children), smallest_side, totals)


def _shown_parts(module: str) -> list[str]:
    parts = module.split(".")
    return parts[: parts.index(BASE_LAYER)] if BASE_LAYER in parts[1:] else parts


def _tree(breakdown: MemoryBreakdown) -> _Node:
    root = _Node("")
    for (category, module), size in breakdown.items():
        node = root
        node.sizes[category] += size
        for part in [NO_MODULE] if module is None else _shown_parts(module) if module else []:
            path = f"{node.path}.{part}" if node.path else part
            node = node.children.setdefault(part, _Node(path))
            node.sizes[category] += size
        node.own[category] = node.own.get(category, 0) + size
    return root


def _add_up(node: _Node, totals: dict[str, int]) -> None:
    """Adds up the bytes of each pattern, so that blocks that differ a little have their modules in the same order."""
    key = pattern(node.path)
    totals[key] = totals.get(key, 0) + node.total
    for child in node.children.values():
        _add_up(child, totals)


def _tiles_of(
    node: _Node, depth: int, area: Rectangle, is_split: bool, smallest_side: float, totals: dict[str, int]
) -> Iterator[Tile]:
    yield Tile(node.path, depth, None, node.total, is_split, area)
    sizes = node.own if is_split else node.sizes
    own = sorted(((key, sizes[key]) for key in Category if sizes.get(key)), key=lambda item: -item[1])
    inner = sorted(node.children.values(), key=lambda child: _sort_key(child, totals)) if is_split else []
    numbered = bool(inner) and all(name.isdecimal() for name in node.children)
    layout = even_rows if numbered else squarify
    rectangles = layout([*(child.total for child in inner), *(size for _, size in own)], area)
    sides = [min(rectangle.width, rectangle.height) for rectangle in rectangles[: len(inner)]]
    # The block of median size decides for all blocks, so that they look alike.
    sides = [median_low(sides)] * len(sides) if numbered else sides
    for child, rectangle, side in zip(inner, rectangles, sides, strict=False):
        # A group that holds only one other group is shown under the name of that one.
        split = bool(child.children) and (side >= smallest_side or (len(child.children) == 1 and not child.own))
        yield from _tiles_of(child, depth + 1, rectangle, split, smallest_side, totals)
    for (category, size), rectangle in zip(own, rectangles[len(inner) :], strict=True):
        yield Tile(node.path, depth + 1, category, size, False, rectangle)


def _sort_key(node: _Node, totals: dict[str, int]) -> tuple[int, int]:
    name = node.path.rpartition(".")[2]
    return -totals[pattern(node.path)], int(name) if name.isdecimal() else 0
