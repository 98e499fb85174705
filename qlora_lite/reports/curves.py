"""Line charts as SVG text, in the manner of the memory page; report.css holds the colours.

Lengths are in units of the viewBox, which are pixels where the picture is shown at its own width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from qlora_lite.memory.drawing.svg import LETTER_WIDTH, picture
from qlora_lite.reports.series import Axis, Point, parts, short, thinned

LEFT, RIGHT, TOP, BOTTOM = 62.0, 10.0, 22.0, 26.0
MOST_TIPS = 240
MOST_STEP_LABELS = 8


@dataclass(frozen=True)
class Line:
    """Points (step, value) of one colour. css_class: of its colour and strength. dots: a dot at each point."""

    css_class: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step, with a few words about it."""

    step: float
    words: str
    css_class: str = "event"


@dataclass(frozen=True)
class Chart:
    """What is drawn. steps: first and last of the horizontal axis. limit: a value with a dashed line.

    best: a point with a ring and its words. tips: text for a step under the pointer. number: how values are written.
    ticks: values and their labels, where the axis does not choose them.
    """

    title: str
    lines: Sequence[Line]
    steps: tuple[float, float]
    values: Axis
    marks: Sequence[Mark] = ()
    limit: float | None = None
    best: tuple[Point, str] | None = None
    tips: dict[float, str] = field(default_factory=dict)
    number: Callable[[float], str] = short
    ticks: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True)
class _Plot:
    """The plot area: converts steps and values to coordinates."""

    chart: Chart
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.width - RIGHT

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM

    def x(self, step: float) -> float:
        first, last = self.chart.steps
        return LEFT + (self.right - LEFT) * (step - first) / max(1e-9, last - first)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - TOP) * self.chart.values.share(value)


def chart_picture(chart: Chart, width: float, height: float) -> str:
    """Returns a chart as an SVG element."""
    plot = _Plot(chart, width, height)
    drawn = (_value_axis(plot), _step_axis(plot), _marks(plot), _limit(plot), _lines(plot), _best(plot), _tips(plot))
    return picture(width, height, "chart", chart.title, (text for part in drawn for text in part))


def _value_axis(plot: _Plot) -> Iterator[str]:
    chart = plot.chart
    for value, label in chart.ticks or [(value, chart.number(value)) for value in chart.values.ticks()]:
        y = plot.y(value)
        yield f'<path class="grid" d="M{LEFT:g} {y:.1f}H{plot.right:g}"/>'
        yield f'<text x="{LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'


def _step_axis(plot: _Plot) -> Iterator[str]:
    first, last = plot.chart.steps
    most = min(MOST_STEP_LABELS, int((plot.right - LEFT) / 70))
    ticks = [step for step in Axis(first, last).ticks() if step == int(step)] if last > first else [first]
    ticks = ticks[:: math.ceil(len(ticks) / most)] or [first]
    y = plot.bottom
    yield f'<path class="axis" d="M{LEFT:g} {y:g}H{plot.right:g}"/>'
    for step in ticks:
        x = plot.x(step)
        anchor = "end" if x > plot.right - 20 else "middle"
        yield f'<text x="{x:.1f}" y="{y + 17:g}" text-anchor="{anchor}">{step:,.0f}</text>'


def _marks(plot: _Plot) -> Iterator[str]:
    free = LEFT  # where the next words may begin
    for mark in sorted(plot.chart.marks, key=lambda mark: mark.step):
        x, room = plot.x(mark.step), len(mark.words) * LETTER_WIDTH
        yield f'<g class="{mark.css_class}"><title>{escape(mark.words)}</title>'
        yield f'<path d="M{x:.1f} {TOP - 6:g}V{plot.bottom:g}"/>'
        begin = min(x + 4, plot.right - room)
        if begin >= free:
            yield f'<text x="{begin:.1f}" y="{TOP - 9:g}">{escape(mark.words)}</text>'
            free = begin + room + 8
        yield "</g>"


def _limit(plot: _Plot) -> Iterator[str]:
    limit, values = plot.chart.limit, plot.chart.values
    if limit is not None and values.low <= limit <= values.high:
        yield f'<path class="limit" d="M{LEFT:g} {plot.y(limit):.1f}H{plot.right:g}"/>'


def _lines(plot: _Plot) -> Iterator[str]:
    for line in plot.chart.lines:
        for part in parts(line.points):
            drawn = thinned(part)
            corners = " ".join(f"{plot.x(step):.1f},{plot.y(value):.1f}" for step, value in drawn)
            if len(drawn) > 1:
                yield f'<path class="line {line.css_class}" d="M{corners}"/>'
            if line.dots or len(drawn) == 1:  # a line of one point would not be seen
                yield from (
                    f'<circle class="{line.css_class}" cx="{plot.x(step):.1f}" cy="{plot.y(value):.1f}" r="3"/>'
                    for step, value in drawn
                )


def _best(plot: _Plot) -> Iterator[str]:
    if plot.chart.best is None:
        return
    (step, value), words = plot.chart.best
    x, y = plot.x(step), plot.y(value)
    room = len(words) * LETTER_WIDTH
    anchor, shift = ("end", -9) if x + room > plot.right - 10 else ("start", 9)
    above = y - 10 if y > TOP + 24 else y + 20
    yield f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>'
    yield f'<text class="peak" x="{x + shift:.1f}" y="{above:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _tips(plot: _Plot) -> Iterator[str]:
    """Yields a strip for each of the steps that have a text, with it, as wide as up to the next one."""
    steps = sorted(plot.chart.tips)
    steps = steps[:: max(1, math.ceil(len(steps) / MOST_TIPS))]
    between = ((plot.x(one) + plot.x(other)) / 2 for one, other in itertools.pairwise(steps))
    edges = [LEFT, *between, plot.right]
    for step, left, right in zip(steps, edges, edges[1:], strict=False):
        yield f'<rect class="tip" x="{left:.1f}" y="{TOP:g}" width="{max(1.0, right - left):.2f}" '
        yield f'height="{plot.bottom - TOP:g}"><title>{escape(plot.chart.tips[step])}</title></rect>'
