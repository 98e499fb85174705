"""Draws two pictures as SVG text: live bytes over a run, and the modules at its peak. page.css holds the colours.

Lengths are in units of the viewBox, which are pixels where the picture is shown at its own width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.drawing.treemap import ITSELF, Rectangle, Tile, tiles
from qlora_lite.memory.report import Timeline, axis_ticks, readable_bytes

LETTER_WIDTH = 6.2  # on average, at the font size of labels
LINE_HEIGHT = 15.0
LEFT, RIGHT, TOP, BOTTOM = 68.0, 8.0, 24.0, 24.0
BETWEEN_PHASES = "between phases"
SMALLEST_SIDE = 100.0  # a group with a shorter side is not split into its modules


def picture(width: float, height: float, css_class: str, title: str, body: Iterator[str]) -> str:
    """Returns an SVG element with these parts. title: what it shows, for those who do not see it."""
    return (
        f'<svg class="{css_class}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"{''.join(body)}</svg>"
    )


def truncated(text: str, room: float) -> str:
    """Returns the text, its beginning with an ellipsis, or nothing, as fits into a width of `room`."""
    letters = int(room / LETTER_WIDTH)
    if len(text) <= letters:
        return text
    return f"{text[: letters - 1]}…" if letters >= 4 else ""


@dataclass(frozen=True)
class _Plot:
    """The plot area of a timeline: converts points and bytes to coordinates."""

    width: float
    height: float
    points: int
    highest: int

    @property
    def right(self) -> float:
        return self.width - RIGHT

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM

    def x(self, point: float) -> float:
        return LEFT + (self.right - LEFT) * point / max(1, self.points)

    def y(self, size: float) -> float:
        return self.bottom - (self.bottom - TOP) * size / self.highest


def timeline_picture(timeline: Timeline, highest: int, width: float, height: float, title: str, tips: bool) -> str:
    """Returns the categories stacked over the points, with the phases below.

    highest: the bytes at the top of the axis, at least the peak. tips: show the sizes of the point under the pointer.
    """
    plot = _Plot(width, height, len(timeline), max(1, highest))
    parts = (_axis(plot), _stack(timeline, plot), _phases(timeline, plot), _peak(timeline, plot))
    body = (text for part in (*parts, _tips(timeline, plot) if tips else ()) for text in part)
    return picture(width, height, "timeline", title, body)


def _axis(plot: _Plot) -> Iterator[str]:
    for size, label in axis_ticks(plot.highest):
        y = plot.y(size)
        yield f'<path class="grid" d="M{LEFT:g} {y:.1f}H{plot.right:g}"/>'
        yield f'<text x="{LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'


def _stack(timeline: Timeline, plot: _Plot) -> Iterator[str]:
    edges = list(
        zip(*(accumulate(point, initial=0) for point in zip(*timeline.sizes.values(), strict=True)), strict=True)
    )
    for category, below, above in zip(timeline.sizes, edges, edges[1:], strict=False):
        if below != above:
            upper, lower = _edge(above, plot), _edge(below, plot)
            yield f'<path class="{category.value}" d="M{" ".join(upper)} {" ".join(reversed(lower))}Z"/>'


def _edge(sizes: Sequence[int], plot: _Plot) -> list[str]:
    """Returns the corners of a step line with one step for each point."""
    corners: list[str] = []
    for point, size in enumerate(sizes):
        if not point or size != sizes[point - 1]:
            corners += [f"{plot.x(point):.1f},{plot.y(y):.1f}" for y in (sizes[point - 1], size)[not point :]]
    return [*corners, f"{plot.x(len(sizes)):.1f},{plot.y(sizes[-1]):.1f}"]


def _phases(timeline: Timeline, plot: _Plot) -> Iterator[str]:
    for number, (phase, first, after) in enumerate(timeline.spans()):
        left, right = plot.x(first), plot.x(after)
        name = phase or BETWEEN_PHASES
        label = truncated(phase or "", right - left - 4)
        shade = "phase odd" if number % 2 else "phase"
        yield f'<g class="{shade if phase else "no-phase"}"><title>{escape(name)}</title>'
        yield f'<rect x="{left:.1f}" y="{plot.bottom:g}" width="{right - left:.1f}" height="20"/>'
        yield f'<path class="border" d="M{left:.1f} {TOP:g}V{plot.bottom:g}"/>' if number else ""
        middle = f'x="{(left + right) / 2:.1f}" y="{plot.bottom + 14:g}" text-anchor="middle"'
        yield f"<text {middle}>{escape(label)}</text></g>"


def _peak(timeline: Timeline, plot: _Plot) -> Iterator[str]:
    totals = timeline.totals()
    if not totals:
        return
    point = totals.index(max(totals))
    x, y = plot.x(point + 0.5), plot.y(totals[point])
    anchor, shift = ("start", -4) if x < plot.width / 2 else ("end", 4)
    yield f'<path class="peak" d="M{x:.1f} {TOP - 8:g}V{plot.bottom:g}"/>'
    yield f'<circle class="peak" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
    label = f"peak {readable_bytes(totals[point])}"
    yield f'<text class="peak" x="{x + shift:.1f}" y="{TOP - 12:g}" text-anchor="{anchor}">{label}</text>'


def _tips(timeline: Timeline, plot: _Plot) -> Iterator[str]:
    sides = f'y="{TOP:g}" width="{plot.x(1) - plot.x(0):.2f}" height="{plot.bottom - TOP:g}"'
    for point, phase in enumerate(timeline.phases):
        sizes = {key.label: column[point] for key, column in timeline.sizes.items() if column[point]}
        parts = "\n".join(f"{name} {readable_bytes(size)}" for name, size in sizes.items())
        total = readable_bytes(sum(sizes.values()))
        yield f'<rect class="tip" x="{plot.x(point):.1f}" {sides}>'
        yield f"<title>{escape(phase or BETWEEN_PHASES)}: {total}\n{parts}</title></rect>"


def treemap_picture(breakdown: MemoryBreakdown, width: float, height: float, title: str) -> str:
    """Returns a treemap of the bytes of each module, coloured by category, with repeated blocks in order."""
    return picture(width, height, "treemap", title, _treemap(breakdown, Rectangle(0, 0, width, height)))


def _treemap(breakdown: MemoryBreakdown, area: Rectangle) -> Iterator[str]:
    found = list(tiles(breakdown, area, SMALLEST_SIDE))
    for tile in found:
        if tile.category is not None:
            tip = f"{tile.path or ITSELF}\n{tile.category.label}: {readable_bytes(tile.size)}"
            yield f'<rect class="{tile.category.value}" {_sides(tile)}><title>{escape(tip)}</title></rect>'
    for tile in sorted(found, key=lambda tile: -tile.depth):
        if tile.category is None and tile.depth:
            css_class = "block" if _is_block(tile) else "group"
            yield f'<rect class="{css_class}" {_sides(tile)}/>'
    yield from _labels(found)


def _sides(tile: Tile) -> str:
    area = tile.rectangle
    return f'x="{area.x:.2f}" y="{area.y:.2f}" width="{area.width:.2f}" height="{area.height:.2f}"'


def _is_block(tile: Tile) -> bool:
    return tile.path.rpartition(".")[2].isdecimal()


def _labels(found: list[Tile]) -> Iterator[str]:
    """Yields names at the upper left of blocks and of groups that are not split.

    The first module of a block shares its corner, so its name is one line lower.
    """
    backgrounds = {_corner(tile): tile for tile in found if tile.category is not None}
    lines: dict[tuple[float, float], int] = {}
    for tile in found:
        below = backgrounds.get(_corner(tile))
        if tile.category is not None or below is None or (tile.is_split and not _is_block(tile)):
            continue
        line = lines.get(_corner(tile), 0) + 1
        # The text colour suits the tile below, so the name must not leave that tile.
        room = below.rectangle.width - 6
        name = next((name for name in _names(tile) if len(name) * LETTER_WIDTH <= room), "")
        if name and below.rectangle.height >= line * LINE_HEIGHT - 2:
            lines[_corner(tile)] = line
            yield _name_text(tile, below, name, line)


def _name_text(tile: Tile, below: Tile, name: str, line: int) -> str:
    css_class = f"name on-{below.category.value}" if below.category else "name"
    strong = " strong" if _is_block(tile) else ""
    position = f'x="{tile.rectangle.x + 6:.1f}" y="{tile.rectangle.y + line * LINE_HEIGHT:.1f}"'
    return f'<text class="{css_class}{strong}" {position}>{escape(name)}</text>'


def _corner(tile: Tile) -> tuple[float, float]:
    return round(tile.rectangle.x, 3), round(tile.rectangle.y, 3)


def _names(tile: Tile) -> tuple[str, ...]:
    """Returns the possible labels of a group, the longest first."""
    parts = tile.path.split(".")
    return (".".join(parts[-2:]), parts[-1]) if _is_block(tile) else (parts[-1],)


def share_bar(sizes: dict[Category, int], whole: int) -> str:
    """Returns a stacked bar of the categories, as long as their share of `whole` bytes."""
    parts = (
        f'<i class="{key.value}" style="width:{100 * size / whole:.3f}%"></i>' for key, size in sizes.items() if size
    )
    return f'<span class="bar" aria-hidden="true">{"".join(parts)}</span>'
