"""Writes the page of one run, or of several beside one another: one HTML file without scripts or network.

A page that is watched reloads itself, which the browser does at the same place; the last one that is written does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from qlora_lite.checkpoints.files import check_writable, new_file
from qlora_lite.checks import require
from qlora_lite.errors import CheckpointError
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.drawing.frame import colour_variables, document, figure_html, style_sheet
from qlora_lite.memory.drawing.palette import DARK, LIGHT
from qlora_lite.memory.drawing.tables import UNKNOWN, Row, size_html, table
from qlora_lite.reports.charts import (
    held_out_chart,
    large_figure,
    legend_html,
    loss_chart,
    run_class,
    small_charts,
    small_figure,
)
from qlora_lite.reports.history import RUNNING, RunHistory, labelled
from qlora_lite.reports.series import short
from qlora_lite.reports.tables import (
    DASH,
    damage_note,
    differences_table,
    duration,
    evaluation_table,
    event_list,
    settings_tables,
    step_table,
)
from qlora_lite.training.config import LOSS
from qlora_lite.training.metrics import Evaluation

SUFFIX = ".html"
# Colours of runs, by contrast with one another and with both backgrounds.
COLOURS = (
    *(Category.BASE_WEIGHT, Category.ACTIVATION, Category.ADAPTER, Category.OPTIMIZER_STATE),
    *(Category.QUANT_STATE, Category.TEMPORARY),
)
MARK = '<meta name="generator" content="qlora-lite report">\n'
MARK_WITHIN = 2000  # bytes


def check_report_path(path: str | Path) -> None:
    """Raises ConfigError or CheckpointError unless a page can be written there. Only another page is replaced."""
    path = Path(path)
    check_writable(path, SUFFIX, overwrite=True)
    if path.exists():
        with open(path, "rb") as file:
            if MARK.strip().encode() not in file.read(MARK_WITHIN):
                raise CheckpointError(f"{path} exists and is not a page of report; name another file with --output")


def write_report(path: str | Path, runs: Sequence[RunHistory], reload_seconds: int | None = None) -> None:
    """Writes the page of these runs, in place of an earlier one. reload_seconds: after which it reloads itself.

    Raises ConfigError without runs and for more than there are colours for, and the errors of `check_report_path`.
    """
    text = report_page(runs, reload_seconds)
    check_report_path(path)
    with new_file(path, overwrite=True) as file:
        file.write(text.encode())


def report_page(runs: Sequence[RunHistory], reload_seconds: int | None = None) -> str:
    """Returns the text of the page that `write_report` writes."""
    require(1 <= len(runs) <= len(COLOURS), f"a page shows 1 to {len(COLOURS)} runs", len(runs))
    runs = labelled(runs)
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    head = MARK + ("" if reload_seconds is None else f'<meta http-equiv="refresh" content="{reload_seconds}">\n')
    sections = _of_one(runs[0], title) if len(runs) == 1 else _of_several(runs, title)
    return document(title, _style(), sections, head)


def _style() -> str:
    names = {run_class(number): key for number, key in enumerate(COLOURS)}
    light, dark = ("".join(f"--{name}:{colours[key]};" for name, key in names.items()) for colours in (LIGHT, DARK))
    rules = "".join(
        f"svg .{name}{{stroke:var(--{name})}}svg circle.{name}{{fill:var(--{name})}}\n"
        f".swatch.{name}{{background:var(--{name})}}\n"
        for name in names
    )
    return colour_variables(light, dark) + style_sheet(__package__, "report.css") + rules


def _badge(run: RunHistory) -> str:
    css = "running" if run.status == RUNNING else "" if run.status in ("finished", "stopped early") else "bad"
    return f'<span class="badge {css}">{escape(run.status)}</span>'


def _of_one(run: RunHistory, title: str) -> Iterator[str]:
    yield f"<header><h1>{escape(title)}</h1>{_badge(run)}</header>"
    yield from _headline(run)
    yield from damage_note(run)
    yield from _curves([run])
    yield "<section><h2>What happened</h2>"
    yield from event_list(run)
    yield "</section><section><h2>The run</h2>"
    yield from settings_tables(run)
    if run.configuration is not None:
        yield "<details><summary>run.yaml, with which the run can be made again</summary>"
        yield f"<pre>{escape(run.configuration)}</pre></details>"
    yield "</section><section><h2>In numbers</h2>"
    yield from evaluation_table(run)
    if run.steps:
        yield from step_table(run)
    yield "</section>"
    yield from _foot()


def _of_several(runs: Sequence[RunHistory], title: str) -> Iterator[str]:
    yield f"<header><h1>{escape(title)}</h1></header>"
    for run in runs:
        yield from damage_note(run)
    yield "<section><h2>Side by side</h2>"
    yield from _runs_table(runs)
    yield "</section>"
    yield from _curves(runs)
    yield "<section><h2>Differences</h2>"
    yield from differences_table(runs)
    yield "</section>"
    for run in runs:
        yield f"<section><h2>What happened in {escape(run.name)}</h2>"
        yield from event_list(run)
        yield "</section>"
    yield from _foot()


def _headline(run: RunHistory) -> Iterator[str]:
    """Yields the figure that a run is judged by, and the others below it."""
    yield '<p class="headline">'
    if run.best is not None:
        count = sum(evaluation.step > 0 for evaluation in run.evaluations)
        by_loss = run.best_by == LOSS
        of = f", the {'lowest' if by_loss else 'highest'} of {count:,} evaluations" if count > 1 else ""
        value = f"{run.best.held_out_loss:.4f}" if by_loss else _score(run.best, run.best_by)
        yield f"<strong>{value}</strong>"
        what = "held-out loss" if by_loss else _words(run.best_by)
        yield f"<span>{what} after <b>step {run.best.step:,}</b>{of}{escape(_others(run))}</span></p>"
    elif run.steps:
        yield f"<strong>{run.steps[-1].loss:.4f}</strong><span>loss of <b>step {run.last_step:,}</b></span></p>"
    else:
        yield f"<strong>{DASH}</strong><span>no step is finished yet</span></p>"
    yield from _figures(run)


def _words(score: str) -> str:
    return score.replace("_", " ")


def _score(evaluation: Evaluation, name: str) -> str:
    score = evaluation.scores.get(name)
    return UNKNOWN if score is None else short(score)


def _others(run: RunHistory) -> str:
    """Returns what else is known of the best evaluation than the figure that it is the best by."""
    assert run.best is not None
    known = [f"{_words(name)} {short(s)}" for name, s in run.best.scores.items() if s is not None]
    if run.best_by != LOSS:
        known = [
            f"held-out loss {run.best.held_out_loss:.4f}",
            *(s for s in known if not s.startswith(_words(run.best_by))),
        ]
    return f"; {', '.join(known)}" if known else ""


def _figures(run: RunHistory) -> Iterator[str]:
    steps, total = run.steps, run.total_steps
    yield '<dl class="figures">'
    left = "" if run.seconds_left is None else f"about {duration(run.seconds_left)} left"
    yield figure_html("steps", f"{run.last_step:,}", left or ("" if total is None else f"of {total:,}"))
    if steps:
        yield figure_html("loss", f"{steps[-1].loss:.4f}", f"{steps[0].loss:.4f} in step {steps[0].step:,}")
        yield figure_html("tokens", f"{run.tokens:,}", "padding included")
        speed = run.tokens / sum(step.tokens / step.tokens_per_second for step in steps if step.tokens_per_second > 0)
        yield figure_html("time", duration(run.seconds), f"{speed:,.0f} tokens a second")
        yield figure_html("peak memory", _peak(run), "of the process or the device")
    before = next((evaluation for evaluation in run.evaluations if evaluation.step == 0), None)
    for name in dict.fromkeys(name for evaluation in run.evaluations for name in evaluation.scores):
        last = run.evaluations[-1].scores.get(name)
        first = None if before is None else before.scores.get(name)
        note = "" if first is None else f"{short(first)} before the first step"
        yield figure_html(name.replace("_", " "), UNKNOWN if last is None else short(last), note)
    yield "</dl>"


def _peak(run: RunHistory) -> str:
    return size_html(run.peak_bytes)


def _curves(runs: Sequence[RunHistory]) -> Iterator[str]:
    chart = loss_chart(runs)
    yield "<section><h2>Loss</h2>"
    if chart is None:
        finished = any(run.steps for run in runs)
        words = "No loss is a finite number." if finished else "No step is finished yet."
        yield f'<p class="note">{words}</p></section>'
        return
    lost = sum(not -1e300 < step.loss < 1e300 for run in runs for step in run.steps)
    gaps = f" {lost:,} steps have no finite loss, and are gaps." if lost else ""
    smooth = "" if len(runs) == 1 else ", smoothed"
    yield f'<p class="note">Mean over the labelled tokens{smooth}, in nats; the horizontal axis counts steps.{gaps}</p>'
    yield from large_figure(chart)
    yield "</section>"
    held_out = held_out_chart(runs) if len(runs) > 1 else None
    if held_out is not None:
        yield "<section><h2>Held-out loss</h2>"
        yield from large_figure(held_out)
        yield f"{legend_html(chart.legend)}</section>"
    yield '<section><h2>Over the steps</h2><div class="small">'
    for small in small_charts(runs):
        yield from small_figure(small)
    yield f"</div>{legend_html(chart.legend) if len(runs) > 1 else ''}</section>"


def _runs_table(runs: Sequence[RunHistory]) -> Iterator[str]:
    rows = []
    for number, run in enumerate(runs):
        best = run.best
        total = "" if run.total_steps is None else f" of {run.total_steps:,}"
        cells = [
            escape(run.status),
            f"{run.last_step:,}{total}",
            f"{run.steps[-1].loss:.4f}" if run.steps else DASH,
            DASH if best is None else f"{_judged_by(run, best)} at {best.step:,}",
            f"{run.tokens:,}",
            duration(run.seconds),
            _peak(run),
        ]
        rows.append(Row(f'<i class="swatch {run_class(number)}"></i> {escape(run.name)}', cells))
    headings = ("run", "state", "steps", "last loss", "best evaluation", "tokens", "time", "peak memory")
    yield from table("runs", f"{len(runs)} runs", headings, rows)


def _judged_by(run: RunHistory, best: Evaluation) -> str:
    if run.best_by == LOSS:
        return f"held-out loss {best.held_out_loss:.4f}"
    return f"{_words(run.best_by)} {_score(best, run.best_by)}"


def _foot() -> Iterator[str]:
    yield "<footer><p>The loss of a step is of its own batches; the smoothed one is an exponential mean over about 2 %"
    yield "of the steps. Gradient norms are before clipping. Time is that of steps and evaluations. Peak memory is that"
    yield "of the process so far, or of the accelerator. 1 MiB is 1,048,576 bytes.</p></footer>"
