"""Compares rehearsed with measured memory: the parts of plan_vs_measured.py, each of which prints a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parts.example_models import fetch_model
from parts.peft_steps import PeftWork, load_base, skeleton, stand_in_, take_steps
from parts.published_runs import BLOG, FMS, T4_BYTES, not_known, published_runs, replayed, steps_peak, work_of
from parts.training_cases import CASES, TINY_CASES, Difference, differences, make_model
from qlora_lite.checkpoints.hub import read_config
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.planning.rehearsal import rehearse
from qlora_lite.planning.training_rehearsal import rehearse_steps
from qlora_lite.training.loop import profile_steps

PEFT_WORKS = tuple(
    PeftWork(format=format, checkpointing=checkpointing, tokens=256)
    for format in ("nf4", "int8", "fp4", "none")
    for checkpointing in ("full", "none")
)
TINY_LAYERS = 2


def show(title: str, headings: Iterable[str], rows: list[list[str]]) -> None:
    """Prints a table."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)


def _share(value: float) -> str:
    return f"{100 * value:+.3f} %"


def _folder(model: str, scratch: Path) -> Path:
    if model == "smollm2":
        return fetch_model()
    return make_model(model, scratch)


def _cells(found: list[Difference]) -> list[str]:
    peak = max(found, key=lambda difference: difference.measured)
    errors = [_share(difference.error) for difference in found]
    return [f"{peak.measured:,}", *errors, _share(max(difference.worst_category for difference in found))]


def compare_ours(scratch: Path, tiny: bool) -> dict[str, Any]:
    """Compares our training, rehearsed and run."""
    rows, all_found = [], []
    for case in TINY_CASES if tiny else CASES:
        folder = _folder(case.model, scratch)
        shape = {"rows": case.rows, "tokens": case.tokens}
        before = rehearse_steps(folder, *case.arguments(), **shape)
        found = list(differences(before, profile_steps(folder, *case.arguments(), **shape)))
        all_found.append(found)
        rows.append([str(case), *_cells(found)])
    show("ours", ("case", "largest peak", "load", "forward", "backward", "optimizer", "worst category"), rows)
    errors = [max(abs(difference.error) for difference in found) for found in all_found]
    return {
        "cases": len(errors),
        "mean_error": statistics.mean(errors),
        "worst_error": max(errors),
        "worst_category_error": max(d.worst_category for found in all_found for d in found),
    }


def compare_peft(scratch: Path, tiny: bool) -> dict[str, Any]:
    """Compares training by transformers + peft + bitsandbytes, rehearsed and run. It has no loading phase."""
    rows, all_found = [], []
    for model in ("llama",) if tiny else ("llama", "smollm2"):
        folder = _folder(model, scratch)
        for work in PEFT_WORKS[:1] if tiny else PEFT_WORKS:
            base = skeleton(read_config(folder), work.format)
            before = rehearse(lambda profiler, base=base, work=work: take_steps(stand_in_(base), work, profiler))
            real = load_base(folder, work.format)
            with MemoryProfiler() as profiler:
                take_steps(real, work, profiler)
            found = list(differences(before, profiler.report()))
            all_found += found
            other = max(difference.other for difference in found)
            rows.append([f"{model} {work.format} {work.checkpointing}", *_cells(found), _share(other)])
    headings = ("case", "largest peak", "forward", "backward", "optimizer", "worst category", "other")
    show("transformers + peft + bitsandbytes", headings, rows)
    return {
        "peft_worst_error": max(abs(difference.error) for difference in all_found),
        "peft_worst_category_error": max(difference.worst_category for difference in all_found),
        "peft_worst_other": max(difference.other for difference in all_found),
    }


def compare_published(scratch: Path, tiny: bool) -> dict[str, Any]:
    """Compares rehearsals with the exact bytes of fms-acceleration's runs on an A100."""
    rows, then, today, ends, aside = [], [], [], [], []
    runs = [run for run in published_runs() if FMS in run.source and run.peak and run.end]
    for run in runs[:1] if tiny else runs:
        work = work_of(run)
        name = [run.model, run.variant, str(run.rows), "aside" if run.held_aside else ""]
        if work is None:
            rows.append([*name, f"{run.peak:,}", "", "", "", "", not_known(run)])
            continue
        assert run.peak is not None and run.end is not None
        layers = TINY_LAYERS if tiny else None
        found = replayed(run, work, True, layers)
        then.append(steps_peak(found) / run.peak - 1)
        today.append(steps_peak(replayed(run, work, False, layers)) / run.peak - 1)
        ends.append(found.end.allocated / run.end - 1)
        aside += then[-1:] if run.held_aside else []
        peaks = [f"{steps_peak(found):,}", _share(then[-1]), _share(today[-1]), _share(ends[-1])]
        rows.append([*name, f"{run.peak:,}", *peaks, ""])
    headings = ("model", "variant", "rows", "", "published peak", "rehearsed", "error", "today's loss", "resident")
    show("published, 4096 tokens a row, A100", (*headings, "not rehearsed for"), rows)
    return {
        "resident_worst_error": max(map(abs, ends)),
        "published_mean_error": statistics.mean(map(abs, then)),
        "published_worst_error": max(map(abs, then)),
        "published_worst_under": min(0.0, *then),
        "published_held_aside_worst_error": max(map(abs, aside)) if aside else None,
        "today_mean_error": statistics.mean(map(abs, today)),
        "today_worst_error": max(map(abs, today)),
    }


def compare_others(scratch: Path, tiny: bool) -> dict[str, Any]:
    """Shows rows whose set-up is known only in part. They do not count in the errors of `compare_published`."""
    rows, right = [], []
    runs = [run for run in published_runs() if FMS not in run.source]
    for run in runs[:1] if tiny else runs:
        work = work_of(run)
        published = f"{run.peak:,}" if run.peak else run.verdict or ""
        predicted = error = ""
        if work is not None:
            peak = steps_peak(replayed(run, work, False))
            predicted = f"{peak:,}"
            if run.peak:
                error = _share(peak / run.peak - 1)
            elif BLOG in run.source:
                right.append((peak <= T4_BYTES) == (run.verdict == "FIT"))
                error = "right" if right[-1] else "wrong"
        size = f"{run.rows} x {run.tokens or '?'}"
        rows.append([run.model, run.format, size, published, predicted, error, not_known(run)])
    headings = ("model", "format", "rows x tokens", "published", "rehearsed", "error", "unknown")
    show("published, set-up known in part", headings, rows)
    return {"verdicts_right": sum(right) / len(right) if right else None}
