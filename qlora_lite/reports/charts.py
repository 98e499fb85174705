"""The charts of a page: which curves one run or several have, and their axes, marks and words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from qlora_lite.memory.drawing.page import SHAPES
from qlora_lite.memory.report import axis_ticks, readable_bytes
from qlora_lite.reports.curves import Chart, Line, Mark, chart_picture
from qlora_lite.reports.history import RunHistory
from qlora_lite.reports.series import Axis, Point, short, smoothed
from qlora_lite.training.metrics import Evaluation, StepMetrics
from qlora_lite.training.observers import FAILED, FINISHED, RESUMED, STOPPED

PERPLEXITY = "perplexity"
HELD_OUT = "held"
SMALL_SIZES = {"wide": (520, 220), "narrow": (360, 220)}
WORDS = {RESUMED: "resumed", STOPPED: "stopped", FAILED: "failed"}


@dataclass(frozen=True)
class Titled:
    """A chart with its heading, and classes of lines with what they stand for."""

    heading: str
    chart: Chart
    legend: Mapping[str, str]


def run_class(number: int) -> str:
    """Returns the CSS class of a run, by its place among those of a page."""
    return f"run-{number + 1}"


def step_range(runs: Sequence[RunHistory]) -> tuple[float, float]:
    """Returns the first and the last step of all charts of a page."""
    first = 0 if any(run.evaluations and run.evaluations[0].step == 0 for run in runs) else 1
    return first, max([1, *(run.last_step for run in runs), *(e.step for run in runs for e in run.evaluations)])


def loss_chart(runs: Sequence[RunHistory]) -> Titled | None:
    """Returns the losses of the steps, and of the held-out batches, with the best of these."""
    lines: list[Line] = []
    legend: dict[str, str] = {}
    for number, run in enumerate(runs):
        css, points = run_class(number), [(float(step.step), float(step.loss)) for step in run.steps]
        means = smoothed([value for _, value in points])
        if len(runs) == 1:
            lines.append(Line(f"{css} raw", points))
            legend |= {f"{css} raw": "loss of a step", css: "smoothed"}
        else:
            legend[css] = run.name
        lines.append(Line(css, [(x, mean) for (x, _), mean in zip(points, means, strict=True)]))
        if len(runs) == 1 and run.evaluations:
            lines.append(Line(HELD_OUT, _of_evaluations(run, lambda e: e.held_out_loss), dots=True))
            legend[HELD_OUT] = "held-out loss"
    return _titled("Loss", lines, legend, runs, tips=_loss_tips, best=_best(runs), title="Loss over the steps")


def held_out_chart(runs: Sequence[RunHistory]) -> Titled | None:
    """Returns the held-out losses of several runs."""
    return _by_evaluation("Held-out loss", runs, lambda evaluation: evaluation.held_out_loss)


def small_charts(runs: Sequence[RunHistory]) -> Iterator[Titled]:
    """Yields the charts of scores, learning rate, gradient norm, memory and speed that the runs have values for."""
    names = dict.fromkeys(name for run in runs for e in run.evaluations for name in e.scores)
    made: list[Titled | None] = [
        _by_evaluation(_words(name), runs, lambda e, name=name: e.scores.get(name), name == PERPLEXITY)  # type: ignore[misc]
        for name in names
    ]
    made.append(_by_step("Learning rate", runs, lambda step: step.learning_rate))
    limits = {run.settings.get("max_grad_norm") for run in runs}
    limit = limits.pop() if len(limits) == 1 else None
    norm = "Gradient norm" if not isinstance(limit, (int, float)) else f"Gradient norm, before clipping to {limit:g}"
    made.append(_by_step(norm, runs, lambda step: step.gradient_norm, limit=limit, may_be_log=True))
    made.append(_by_step("Peak memory", runs, lambda step: step.peak_bytes, in_bytes=True))
    made.append(_by_step("Tokens a second", runs, lambda step: step.tokens_per_second))
    yield from (chart for chart in made if chart is not None)


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _of_evaluations(run: RunHistory, value: Callable[[Evaluation], float | None]) -> list[Point]:
    found = ((float(evaluation.step), value(evaluation)) for evaluation in run.evaluations)
    return [(step, float(score)) for step, score in found if score is not None]


def _by_step(
    heading: str,
    runs: Sequence[RunHistory],
    value: Callable[[StepMetrics], float | None],
    limit: object = None,
    may_be_log: bool = False,
    in_bytes: bool = False,
) -> Titled | None:
    lines = []
    for number, run in enumerate(runs):
        found = ((float(step.step), value(step)) for step in run.steps)
        lines.append(Line(run_class(number), [(step, float(size)) for step, size in found if size is not None]))
    return _titled(heading, lines, {}, runs, limit=limit, may_be_log=may_be_log, in_bytes=in_bytes, from_zero=True)


def _by_evaluation(
    heading: str, runs: Sequence[RunHistory], value: Callable[[Evaluation], float | None], may_be_log: bool = False
) -> Titled | None:
    alone = len(runs) == 1
    lines = [
        Line(HELD_OUT if alone else run_class(number), _of_evaluations(run, value), dots=True)
        for number, run in enumerate(runs)
    ]
    return _titled(heading, lines, {}, runs, may_be_log=may_be_log)


def _titled(
    heading: str,
    lines: Sequence[Line],
    legend: Mapping[str, str],
    runs: Sequence[RunHistory],
    *,
    title: str = "",
    tips: Callable[[RunHistory], dict[float, str]] | None = None,
    best: tuple[Point, str] | None = None,
    limit: object = None,
    from_zero: bool = False,
    may_be_log: bool = False,
    in_bytes: bool = False,
) -> Titled | None:
    """Returns a chart; None if no value can be drawn."""
    values = [value for line in lines for _, value in line.points]
    axis = Axis.of(values, from_zero, may_be_log)
    if axis is None:
        return None
    number: Callable[[float], str] = (lambda value: readable_bytes(int(value))) if in_bytes else short
    told = tips(runs[0]) if tips is not None and len(runs) == 1 else _line_tips(lines, runs, number)
    chart = Chart(
        title or f"{heading} over the steps",
        lines,
        step_range(runs),
        axis,
        marks=_marks(runs[0]) if len(runs) == 1 else (),
        limit=float(limit) if isinstance(limit, (int, float)) else None,
        best=best,
        tips=told,
        number=number,
        ticks=[(float(size), label) for size, label in axis_ticks(int(axis.high))] if in_bytes else (),
    )
    return Titled(heading, chart, legend)


def _marks(run: RunHistory) -> list[Mark]:
    """Returns the places where a run was stopped, went on or failed; of several at one step, the last one."""
    found = {
        event["step"]: Mark(event["step"], WORDS[event["event"]], FAILED if event["event"] == FAILED else "event")
        for event in run.events
        if event["event"] in WORDS
    }
    if run.events and run.events[-1]["event"] == FINISHED and run.events[-1].get("early"):
        found[run.last_step] = Mark(run.last_step, "stopped early")
    return list(found.values())


def _best(runs: Sequence[RunHistory]) -> tuple[Point, str] | None:
    best = runs[0].best if len(runs) == 1 else None
    if best is None or not math.isfinite(best.held_out_loss):
        return None
    return (best.step, best.held_out_loss), f"best {best.held_out_loss:.4g}"


def _loss_tips(run: RunHistory) -> dict[float, str]:
    means = smoothed([step.loss for step in run.steps])
    tips = {
        float(step.step): f"step {step.step:,}\nloss {step.loss:.4f}\nsmoothed {mean:.4f}"
        for step, mean in zip(run.steps, means, strict=True)
    }
    for evaluation in run.evaluations:
        before = tips.get(evaluation.step, f"step {evaluation.step:,}")
        tips[evaluation.step] = f"{before}\nheld-out loss {evaluation.held_out_loss:.4f}"
    return tips


def _line_tips(lines: Sequence[Line], runs: Sequence[RunHistory], number: Callable[[float], str]) -> dict[float, str]:
    """Returns the values of all lines at each step."""
    names = [run.name for run in runs] if len(runs) > 1 else ["value"]
    tips: dict[float, str] = {}
    for line, name in zip(lines, names, strict=False):
        for step, value in line.points:
            words = number(value) if len(runs) == 1 else f"{name}: {number(value)}"
            tips[step] = f"{tips.get(step, f'step {step:,.0f}')}\n{words}"
    return tips


def large_figure(titled: Titled) -> Iterator[str]:
    """Yields a chart over the whole width of the page."""
    yield "<figure>"
    for shape, width, height in SHAPES:
        yield f'<div class="{shape}">{chart_picture(titled.chart, width, height)}</div>'
    yield "</figure>"
    yield legend_html(titled.legend)


def small_figure(titled: Titled) -> Iterator[str]:
    """Yields a chart of half the width, or the whole of a narrow page."""
    yield f"<div><h3>{escape(titled.heading)}</h3><figure>"
    for shape, (width, height) in SMALL_SIZES.items():
        yield f'<div class="{shape}">{chart_picture(titled.chart, width, height)}</div>'
    yield "</figure></div>"


def legend_html(legend: Mapping[str, str]) -> str:
    """Returns what the classes of lines stand for."""
    items = (f'<li><i class="swatch {css}"></i>{escape(words)}</li>' for css, words in legend.items())
    return f'<ul class="legend">{"".join(items)}</ul>' if legend else ""


def sampled(count: int, most: int) -> list[int]:
    """Returns up to `most` of the indices below `count`, spread evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted(set(itertools.chain(round(n * (count - 1) / (most - 1)) for n in range(most))))
