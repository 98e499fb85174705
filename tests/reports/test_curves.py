"""Tests of line charts: where points are drawn, gaps, marks and tips."""

from __future__ import annotations

import math
import re

from qlora_lite.reports.curves import BOTTOM, LEFT, RIGHT, TOP, Chart, Line, Mark, chart_picture
from qlora_lite.reports.series import Axis

WIDTH, HEIGHT = 500.0, 200.0


def drawn(points: list[tuple[float, float]], **more: object) -> str:
    chart = Chart("A <title>", [Line("run-1", points)], (0, 10), Axis(0, 4), **more)  # type: ignore[arg-type]
    return chart_picture(chart, WIDTH, HEIGHT)


def test_points_lie_where_their_values_say() -> None:
    text = drawn([(0, 0.0), (10, 4.0)])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    assert f'<path class="line run-1" d="M{LEFT:.1f},{bottom:.1f} {right:.1f},{TOP:.1f}"/>' in text
    assert 'aria-label="A &lt;title&gt;"' in text
    assert re.findall(r'text-anchor="end">([\d.]+)<', text)[:5] == ["0", "1", "2", "3", "4"]


def test_what_is_not_finite_is_a_gap_and_one_point_is_a_dot() -> None:
    text = drawn([(0, 1.0), (1, 2.0), (2, math.nan), (3, 2.0), (4, math.inf)])
    assert text.count('<path class="line run-1"') == 1 and text.count('<circle class="run-1"') == 1
    assert "nan" not in text and "inf" not in text


def test_marks_limit_best_and_tips() -> None:
    marks = [Mark(3, "stopped"), Mark(3.1, "resumed"), Mark(9.9, "failed", "failed")]
    tips = {float(step): f"step {step}\n<1>" for step in range(1000)}
    text = drawn([(0, 1.0), (10, 2.0)], marks=marks, limit=1.0, best=((10, 2.0), "best 2"), tips=tips)
    assert text.count("<g class=") == 3 and ">resumed</text>" not in text, "words on words"
    assert '<g class="failed"><title>failed</title>' in text and '<path class="limit"' in text
    assert '<circle class="best" cx="490.0"' in text and 'text-anchor="end">best 2</text>' in text
    assert 100 < text.count('<rect class="tip"') <= 240 and "step 0\n&lt;1&gt;" in text
    assert '<path class="limit"' not in drawn([(0, 1.0)], limit=9.0)
