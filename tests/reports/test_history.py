"""Tests of the history of a run: what is read, also of damaged files, and what is refused."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_lite import LinearWithLoRA, TrainConfig
from qlora_lite.data.stream import BatchStream
from qlora_lite.errors import CheckpointError
from qlora_lite.reports.history import RUNNING, UNKNOWN, is_before_run, labelled, read_history
from qlora_lite.reports.page import report_page
from qlora_lite.system import locked
from qlora_lite.training.run_folder import run_folder
from qlora_lite.training.run_state import Run

Make = Callable[..., Path]


def test_a_whole_run(make_run: Make) -> None:
    run = read_history(make_run())
    assert run.name == "run" and run.last_step == run.total_steps == 30 and run.status == "finished"
    assert [step.loss for step in run.steps[:2]] == [4.0, 2.0] and run.peak_bytes == 630 << 20
    assert run.best is not None and (run.best.step, run.best.held_out_loss) == (20, 2.0)
    assert run.tokens == 30_000 and run.seconds == 30 * 2 + 4 * 2 and run.seconds_left is None
    assert run.settings["learning_rate"] == 2e-4 and run.data is not None and run.data["records"] == 1200
    assert run.adapter is not None and run.adapter["r"] == 16 and run.configuration == "model: a/<model>\n"
    assert not run.damage and not run.is_running
    figures = run.figures()
    assert figures["best_step"] == 20 and figures["last_exact_match"] == 0.75 and figures["state"] == "finished"
    assert json.loads(json.dumps(figures)) == figures


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ({"event": "stopped", "step": 30, "reason": "SIGINT"}, "stopped by SIGINT"),
        ({"event": "failed", "step": 30, "reason": "NotFiniteError: nan"}, "failed"),
        ({"event": "finished", "step": 30, "early": True}, "stopped early"),
        ({"event": "resumed", "step": 30, "settings": {"steps": 30}}, "finished"),  # killed after its last step
        (None, UNKNOWN),
    ],
)
def test_how_a_run_ended(make_run: Make, last: dict[str, object] | None, status: str) -> None:
    folder = make_run(steps=30 if last else 20)
    lines = (folder / "events.jsonl").read_text().splitlines()[:3]
    (folder / "events.jsonl").write_text("\n".join([*lines, json.dumps(last)] if last else lines) + "\n")
    run = read_history(folder)
    assert run.status == status and (run.ending is None) == (last is None or last["event"] == "resumed")


def test_a_run_at_work_and_its_last_line_that_is_still_written(make_run: Make) -> None:
    folder = make_run(steps=20)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "lo')
    assert [damage.line for damage in read_history(folder).damage] == [24]
    with locked(folder / ".run.lock"):
        os.utime(folder / "metrics.jsonl")  # as if it were written now
        run = read_history(folder)
    assert run.is_running and run.status == RUNNING and not run.damage and run.ending is None
    assert run.seconds_left == pytest.approx((20 * 2 + 3 * 2) / 20 * 10)


def test_a_run_before_its_first_step_can_be_read_while_it_is_at_work(tmp_path: Path) -> None:
    with locked(tmp_path / ".run.lock"):
        run = read_history(tmp_path)
    assert run.steps == [] and run.status == RUNNING and run.best is None and run.figures()["last_loss"] is None


def test_of_a_run_that_replaces_another_nothing_is_read_until_it_writes(make_run: Make) -> None:
    folder = make_run(steps=20)
    os.utime(folder / "metrics.jsonl", (1, 1))
    assert read_history(folder).last_step == 20
    with locked(folder / ".run.lock"):
        run = read_history(folder)
        assert run.is_running and run.steps == [] == run.evaluations and run.events == [] and not run.settings
        assert run.configuration is run.data is run.adapter is None
        page = report_page([run])
        assert "written with the first step" in page and "older than" not in page and "run.yaml" not in page
        os.utime(folder / "metrics.jsonl")
        assert read_history(folder).last_step == 20


def test_the_training_loop_marks_which_of_the_two_it_is(make_run: Make) -> None:
    """The reader goes by the times of two files, so these are seen with the real writer too."""
    folder = make_run(steps=20)
    os.utime(folder / "metrics.jsonl", (1, 1))
    layers = nn.Sequential(LinearWithLoRA(4, 4, 2))
    run = Run(layers, {}, torch.optim.SGD([torch.zeros(1)]), TrainConfig(), BatchStream([], None, None))
    for options, steps in (({"overwrite": True}, 0), ({"overwrite": False, "resume": True}, 20)):
        with run_folder(run, folder, **options):
            assert read_history(folder).last_step == steps


def test_damaged_lines_are_left_out_and_listed(make_run: Make) -> None:
    folder = make_run(evaluations=False, steps=3)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    whole = json.loads(lines[0])
    bad = [
        "{broken",
        "[1]",
        json.dumps({**whole, "step": "4"}),
        json.dumps({**whole, "step": 4, "loss": None}),
        json.dumps({**whole, "step": 4, "loss": 10**400}),
        json.dumps({"step": 3, "held_out_loss": None, "seconds": 1}),
        json.dumps({**whole, "step": 3}),
        json.dumps({**whole, "step": 5, "loss": math.nan}),
        "\udcff",
    ]
    text = "\n".join([*lines, *bad]).encode("utf-8", "surrogateescape")
    (folder / "metrics.jsonl").write_bytes(text)
    (folder / "data.json").write_text("[]")
    (folder / "events.jsonl").write_text('{"event": 3}\n{"event": "started", "step": 0}\n')
    run = read_history(folder)
    assert [step.step for step in run.steps] == [1, 2, 3, 5] and math.isnan(run.steps[-1].loss)
    assert run.figures()["last_loss"] is None and run.data is None and run.settings == {}
    assert [(damage.line, damage.reason) for damage in run.damage if damage.line] == [
        (4, "is not JSON"),
        (5, "a list"),
        (6, "no number of a step"),
        (7, "no number for loss"),
        (8, "no number for loss"),
        (9, "an evaluation without numbers: held_out_loss"),
        (10, "is a second line of step 3"),
        (12, "is not JSON"),
        (1, "is not an event"),
    ]
    assert "should hold a JSON object" in run.damage[-1].reason


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "metrics.jsonl").write_text("{}\n")
    for name, message in (
        ("file", "file is a file; name the --output folder of a run of train"),
        ("none", "none does not exist; name the --output folder"),
        ("empty", "empty is not the folder of a run with a finished step: it has no metrics.jsonl"),
        ("lines", "metrics.jsonl has no line of a step; there is nothing to draw"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_history(tmp_path / name)
    assert [is_before_run(tmp_path / name) for name in ("file", "none", "empty", "lines")] == [False, True, True, False]


def test_runs_of_one_name_are_told_apart_by_their_paths(make_run: Make) -> None:
    run = read_history(make_run())
    other, same = replace(run, folder=Path("else/run")), replace(run, folder=Path("else/other"))
    assert [found.name for found in labelled([run, other, same])] == [str(run.folder), "else/run", "other"]


def test_what_is_not_an_event_is_listed(make_run: Make) -> None:
    folder = make_run()
    before = len(read_history(folder).events)
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"event": 5, "step": 1}\n{"event": "resumed", "step": -1}\n[]\n')
    run = read_history(folder)
    assert len(run.events) == before
    assert [(damage.line, damage.reason) for damage in run.damage] == [(n, "is not an event") for n in (5, 6, 7)]
