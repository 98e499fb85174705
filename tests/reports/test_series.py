"""Tests of values over steps: means, stretches, thinning and axes."""

from __future__ import annotations

import math

import pytest

from qlora_lite.reports.series import MOST_TICKS, Axis, parts, short, smoothed, thinned


def test_a_smoothed_value_is_the_weighted_mean_of_those_before_it() -> None:
    values = [4.0, 2.0, math.nan, 1.0]
    means = smoothed(values)
    weights = [0.8**2, 0.8, 1.0]  # a mean over five steps
    assert means[0] == 4.0 and means[1] == pytest.approx((0.8 * 4 + 2) / 1.8) and math.isnan(means[2])
    assert means[3] == pytest.approx(sum(w * v for w, v in zip(weights, (4.0, 2.0, 1.0), strict=True)) / sum(weights))
    assert smoothed([]) == [] and math.isnan(smoothed([math.inf])[0])


def test_gaps_are_where_nothing_can_be_drawn() -> None:
    points = [(1.0, math.nan), (2.0, 1.0), (3.0, 2.0), (4.0, math.inf), (5.0, 3.0)]
    assert list(parts(points)) == [[(2.0, 1.0), (3.0, 2.0)], [(5.0, 3.0)]]


def test_no_spike_is_lost_by_thinning() -> None:
    points = [(float(x), 100.0 if x == 7_777 else -5.0 if x == 1_234 else 1.0) for x in range(10_000)]
    few = thinned(points, 200)
    assert len(few) <= 202 and {(7777.0, 100.0), (1234.0, -5.0), points[0], points[-1]} <= {*few}
    assert [x for x, _ in few] == sorted(x for x, _ in few) and thinned(points[:9], 200) == points[:9]


def test_axes() -> None:
    axis = Axis.of([1.0, 3.0, math.nan])
    assert axis is not None and axis.low < 1 < 3 < axis.high
    assert axis.share(axis.low) == 0 and axis.share(axis.high) == 1
    from_zero = Axis.of([2.0, 8.0], from_zero=True)
    assert from_zero is not None and from_zero.low == 0 and from_zero.ticks() == [0, 2, 4, 6, 8]
    log = Axis.of([1.0, 1.1, 1.0, 500.0], may_be_log=True)
    assert log is not None and log.is_log and log.ticks() == [1, 10, 100] and log.share(1.0) == 0
    assert Axis.of([math.nan]) is None
    for value in (0.0, 5.0, -3.0):
        alone = Axis.of([value])
        assert alone is not None and 0 <= alone.share(value) <= 1 and 1 <= len(alone.ticks()) <= MOST_TICKS + 1


def test_numbers_in_few_letters() -> None:
    assert [short(value) for value in (0, 1.0, 2e-4, 0.00525, 1234567.0, 3e9, math.nan)] == [
        *("0", "1", "0.0002", "0.00525", "1,234,567", "3e+09", "nan")
    ]
