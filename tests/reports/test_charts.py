"""Tests of which curves runs have, with their axes, marks and words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from qlora_lite.reports.charts import held_out_chart, legend_html, loss_chart, sampled, small_charts
from qlora_lite.reports.history import read_history

Make = Callable[..., Path]


def test_the_losses_of_one_run(make_run: Make) -> None:
    titled = loss_chart([read_history(make_run())])
    assert titled is not None
    chart = titled.chart
    assert [line.css_class for line in chart.lines] == ["run-1 raw", "run-1", "held"] and chart.steps == (0, 30)
    assert chart.lines[0].points[1] == (2, 2.0)
    assert chart.lines[2].points == [
        (0, 4.0),
        (10, 2.5),
        (20, 2.0),
        (30, 2.25),
    ]
    assert chart.best == ((20, 2.0), "best 2")
    assert [(mark.step, mark.words) for mark in chart.marks] == [(10, "resumed")]
    assert chart.tips[10].startswith("step 10\nloss 0.4000\nsmoothed ") and "held-out loss 2.5000" in chart.tips[10]
    assert list(titled.legend.values()) == ["loss of a step", "smoothed", "held-out loss"]


def test_small_charts_are_of_what_is_known(make_run: Make) -> None:
    run = read_history(make_run())
    charts = {titled.heading: titled.chart for titled in small_charts([run])}
    norm = "Gradient norm, before clipping to 1"
    assert list(charts) == ["Perplexity", "Exact match", "Learning rate", norm, "Peak memory", "Tokens a second"]
    assert charts[norm].limit == 1.0 and charts["Peak memory"].ticks[0] == (0.0, "0")
    assert charts["Peak memory"].number(601 << 20) == "601.0 MiB"
    folder = make_run("plain", evaluations=False)
    lines = [json.loads(line) | {"peak_bytes": None} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "events.jsonl").unlink()
    plain = read_history(folder)
    assert [titled.heading for titled in small_charts([plain])] == ["Learning rate", "Gradient norm", "Tokens a second"]
    titled = loss_chart([plain])
    assert titled is not None and titled.chart.steps == (1, 30) and titled.chart.best is None


def test_several_runs_have_a_colour_each(make_run: Make) -> None:
    runs = [read_history(make_run(name)) for name in ("one", "other")]
    titled, held_out = loss_chart(runs), held_out_chart(runs)
    assert titled is not None and held_out is not None
    assert titled.legend == {"run-1": "one", "run-2": "other"} and titled.chart.marks == ()
    assert [line.css_class for line in held_out.chart.lines] == ["run-1", "run-2"]
    assert held_out.chart.tips[10] == "step 10\none: 2.5\nother: 2.5"
    assert legend_html({"run-1": "<one>"}).count("&lt;one&gt;") == 1 and legend_html({}) == ""


def test_rows_are_spread_evenly() -> None:
    assert sampled(3, 16) == [0, 1, 2] and sampled(1, 16) == [0] and sampled(0, 16) == []
    spread = sampled(1000, 16)
    assert len(spread) == 16 and (spread[0], spread[-1]) == (0, 999)
