"""Values over the steps of a run: smoothed, thinned for drawing, and the axes that they are drawn on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

# Points of a line: more than a screen has columns for, and few enough that a page of ten thousand steps is small.
MOST_POINTS = 600
# A smoothed value is a mean over about this share of the steps, and over no fewer than SHORTEST of them.
SMOOTHED_SHARE, SHORTEST = 0.02, 5
MOST_TICKS = 5
# An axis is logarithmic if its largest value is more than so many times the median one.
SPREAD = 30

Point = tuple[float, float]


def smoothed(values: Sequence[float]) -> list[float]:
    """Returns the exponential mean up to each value, without bias to the start; NaN stays NaN, and is in no mean.

    m_t = sum of d^(t-i) x_i / sum of d^(t-i), with d = 1 - 1 / n and n steps in the mean.
    """
    decay = 1 - 1 / max(SHORTEST, SMOOTHED_SHARE * len(values))
    total, weight, found = 0.0, 0.0, []
    for value in values:
        if not math.isfinite(value):
            found.append(math.nan)
            continue
        total, weight = total * decay + value, weight * decay + 1
        found.append(total / weight)
    return found


def parts(points: Iterable[Point]) -> Iterator[list[Point]]:
    """Yields the stretches of points without a value that cannot be drawn (NaN, infinity) between them."""
    part: list[Point] = []
    for x, y in points:
        if math.isfinite(y):
            part.append((x, y))
        elif part:
            yield part
            part = []
    if part:
        yield part


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """Returns at most about `most` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    found: list[Point] = [points[0]]
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        found += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return [*found, points[-1]]


@dataclass(frozen=True)
class Axis:
    """The values from `low` to `high`, which are shares 0 to 1 of a length. is_log: of their logarithms."""

    low: float
    high: float
    is_log: bool = False

    @classmethod
    def of(cls, values: Iterable[float], from_zero: bool = False, may_be_log: bool = False) -> Axis | None:
        """Returns an axis for these values; None if none of them can be drawn."""
        known = sorted(value for value in values if math.isfinite(value))
        if not known:
            return None
        low, high = known[0], known[-1]
        if may_be_log and low > 0 and high > SPREAD * known[len(known) // 2]:
            return cls(low, high, True)
        low = min(low, 0.0) if from_zero else low
        if low == high:  # one value, in the middle
            low, high = (0.0, 1.0) if high == 0 else (low - abs(low) / 2, high + abs(high) / 2)
        room = 0.0 if from_zero else 0.04 * (high - low)
        return cls(low - room, high + 0.04 * (high - low))

    def share(self, value: float) -> float:
        """Returns where a value lies, 0 at the low end."""
        if self.is_log:
            whole = math.log(self.high) - math.log(self.low)
            return (math.log(value) - math.log(self.low)) / whole
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Returns values to mark: multiples of 1, 2 or 5 times a power of ten, or powers of ten."""
        if self.is_log:
            lowest, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            gap = max(1, math.ceil((last - lowest) / MOST_TICKS))
            return [10.0**power for power in range(lowest, last + 1, gap)]
        step = _step(self.high - self.low)
        begin = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(begin, math.floor(self.high / step + 1e-9) + 1)]


def _step(length: float) -> float:
    """Returns the distance of ticks: the smallest of 1, 2 and 5 times a power of ten that gives few enough."""
    power = 10.0 ** math.floor(math.log10(length / MOST_TICKS))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power * MOST_TICKS >= length * (1 - 1e-9))


def short(value: float) -> str:
    """Returns a number in few letters: `0.0002`, `1.25`, `12,300`."""
    if value == 0:
        return "0"
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size < 1e-3 or size >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"
