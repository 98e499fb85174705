"""The words and tables of a page: what happened in a run, its settings, and its figures without curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from qlora_lite.memory.drawing.tables import Row, size_html, table
from qlora_lite.reports.charts import sampled
from qlora_lite.reports.history import RunHistory
from qlora_lite.reports.series import short
from qlora_lite.training.observers import FAILED, FINISHED, OBSERVER_LOST, RESUMED, STARTED, STOPPED

MOST_ROWS = 16
SHOWN_DAMAGE = 6
DASH = "–"
MOST_LISTED = 8
# Keys of the adapter's configuration in peft's form, and how they are called.
ADAPTER_KEYS = {
    "base_model_name_or_path": "base",
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "target modules",
    "lora_dropout": "dropout",
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA",
    "modules_to_save": "modules to save",
    "task_type": "task",
}


def duration(seconds: float) -> str:
    """Returns a time in words: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def what_happened(event: Mapping[str, Any]) -> str:
    """Returns an event in words."""
    kind, reason = event["event"], event.get("reason", "")
    words = {
        STARTED: "The run started.",
        RESUMED: f"The run went on after step {event['step']:,}.",
        STOPPED: f"The run was stopped by {reason}, and a checkpoint was written.",
        FAILED: f"The run failed: {reason}",
        FINISHED: "The run finished.",
        OBSERVER_LOST: f"{event.get('observer', 'An observer')} failed and is without the later steps: {reason}",
    }
    if kind == FINISHED and event.get("early"):
        return "The run stopped early: the held-out loss did not fall any more."
    return words.get(kind, f"{kind} {reason}".strip())


def _why_missing(run: RunHistory) -> str:
    return "they are written with the first step" if run.is_running else "the run is older than events.jsonl"


def event_list(run: RunHistory) -> Iterator[str]:
    """Yields what happened in a run, with the times."""
    if not run.events:
        yield f'<p class="note">No events are noted: {_why_missing(run)}.</p>'
        return
    yield '<ul class="events">'
    for event in run.events:
        time = escape(str(event.get("time", "")).replace("T", " ").replace("+00:00", " UTC"))
        at = f"step {event['step']:,}"
        yield f'<li><time>{time}</time><span class="at">{at}</span><p>{escape(what_happened(event))}</p></li>'
    if run.ending is None and not run.is_running:
        last = f"step {run.last_step:,}"
        yield f'<li><time></time><span class="at">{last}</span><p>Nothing is noted after this: it was killed.</p></li>'
    yield "</ul>"


def damage_note(run: RunHistory) -> Iterator[str]:
    """Yields which lines could not be read, if there are any."""
    if run.damage:
        shown = [f"{d.file}:{d.line} {d.reason}" if d.line else d.reason for d in run.damage[:SHOWN_DAMAGE]]
        more = f", and {len(run.damage) - SHOWN_DAMAGE} more" if len(run.damage) > SHOWN_DAMAGE else ""
        lines = "a line is" if len(run.damage) == 1 else f"{len(run.damage):,} lines are"
        yield f'<p class="note warning">In {escape(run.name)} {lines} damaged and left out: '
        yield f"{escape('; '.join(shown))}{more}.</p>"


def value_text(value: object) -> str:
    """Returns a setting as text."""
    if value is None or value in ("", [], {}):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return short(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {value_text(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        more = f" and {len(value) - MOST_LISTED} more" if len(value) > MOST_LISTED else ""
        return ", ".join(value_text(part) for part in value[:MOST_LISTED]) + more
    return str(value)


def known_settings(run: RunHistory) -> dict[str, dict[str, object]]:
    """Returns what is known of a run, in groups: settings, base, adapter, data."""
    base, adapters = (run.facts.get(name) for name in ("base", "adapters"))
    written = run.adapter or {}
    adapter = {words: written[key] for key, words in ADAPTER_KEYS.items() if key in written}
    adapter |= {key.replace("_", " "): value for key, value in (adapters or {}).items() if key not in ("rank", "alpha")}
    data = {key: value for key, value in (run.data or {}).items() if not isinstance(value, (dict, list))}
    groups: dict[str, dict[str, object]] = {
        "Settings": dict(run.settings),
        "Base": dict(base) if isinstance(base, Mapping) else {},
        "Adapter": adapter,
        "Data": data,
    }
    return {
        name: {key.replace("_", " "): value for key, value in group.items()} for name, group in groups.items() if group
    }


def settings_tables(run: RunHistory) -> Iterator[str]:
    """Yields the settings of a run, its base, its adapter and its data."""
    groups = known_settings(run)
    if not groups:
        yield f'<p class="note">Nothing is noted of the settings: {_why_missing(run)}.</p>'
        return
    yield '<div class="pairs">'
    for name, group in groups.items():
        yield f"<table><caption>{name}</caption><tbody>"
        for key, value in group.items():
            yield f'<tr><th scope="row">{escape(key)}</th><td>{escape(value_text(value))}</td></tr>'
        yield "</tbody></table>"
    yield "</div>"


def differences_table(runs: Sequence[RunHistory]) -> Iterator[str]:
    """Yields the settings in which runs differ."""
    flat = [
        {(name, key): value_text(v) for name, g in known_settings(run).items() for key, v in g.items()} for run in runs
    ]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [
        Row(escape(key), [escape(settings.get((name, key), DASH)) for settings in flat], name)
        for name, key in keys
        if len({settings.get((name, key), DASH) for settings in flat}) > 1
    ]
    if not rows:
        yield '<p class="note">The runs have the same settings, as far as they are noted.</p>'
        return
    yield from table("differences", "Settings in which the runs differ", ["", *(escape(r.name) for r in runs)], rows)


def step_table(run: RunHistory) -> Iterator[str]:
    """Yields the figures of some steps, spread evenly over the run."""
    indices = sampled(len(run.steps), MOST_ROWS)
    steps = [run.steps[index] for index in indices]
    all_of = "all steps" if len(steps) == len(run.steps) else f"{len(steps)} of {len(run.steps):,} steps"
    rows = [
        Row(
            f"{step.step:,}",
            [
                f"{step.loss:.4f}",
                short(step.learning_rate),
                short(step.gradient_norm),
                f"{step.tokens:,}",
                f"{step.tokens_per_second:,.0f}",
                size_html(step.peak_bytes),
            ],
        )
        for step in steps
    ]
    headings = ("step", "loss", "learning rate", "gradient norm", "tokens", "tokens/s", "peak memory")
    yield from table("steps", f"Figures of {all_of}", headings, rows)


def evaluation_table(run: RunHistory) -> Iterator[str]:
    """Yields the figures of the evaluations, with the best one marked; nothing if there are none."""
    if not run.evaluations:
        return
    evaluations = [run.evaluations[index] for index in sampled(len(run.evaluations), 2 * MOST_ROWS)]
    if run.best is not None and run.best not in evaluations:
        evaluations = sorted([*evaluations, run.best], key=lambda evaluation: evaluation.step)
    names = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.scores))
    rows = []
    for evaluation in evaluations:
        scores = [evaluation.scores.get(name) for name in names]
        best = " (best)" if evaluation == run.best else ""
        cells = [f"{evaluation.held_out_loss:.4f}{best}", *(DASH if s is None else short(s) for s in scores)]
        rows.append(Row(f"{evaluation.step:,}", [*cells, f"{evaluation.seconds:,.1f}"]))
    headings = ("step", "held-out loss", *(escape(name.replace("_", " ")) for name in names), "seconds")
    shown = "" if len(evaluations) == len(run.evaluations) else f"{len(evaluations)} of "
    yield from table("evaluations", f"{shown}{len(run.evaluations):,} evaluations", headings, rows)
