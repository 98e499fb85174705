"""Tests of trackers: what TensorBoard's files hold, what the others are told, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking

from qlora_lite.errors import ConfigError, TrainingError
from qlora_lite.integrations.trackers import TRACKERS, Tracker, flat, open_trackers
from qlora_lite.training.metrics import Evaluation, StepMetrics

FACTS = {"settings": {"steps": 5, "patience": None}, "base": {"name": "m", "packed": {"nf4": 2}}, "list": [1]}


def step(number: int, peak: int | None = 7) -> StepMetrics:
    return StepMetrics(number, 4.0 / number, 0.5, 1e-4, 100, 50.0, peak)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """The values in TensorBoard's files by name and step; a step that is there twice fails."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    found: dict[str, dict[int, float]] = {}
    for name in read.Tags()["scalars"]:
        events = read.Scalars(name)
        found[name] = {event.step: event.value for event in events}
        assert len(found[name]) == len(events), f"{name} has a step twice"
    return found


def told(folder: Path, after: int, last: int) -> None:
    """Tells TensorBoard of the steps of a run, and of evaluations of every second one."""
    (tracker,) = open_trackers(["tensorboard", "tensorboard"], folder)
    tracker.started(after, FACTS)
    if after == 0:
        tracker.evaluated(Evaluation(0, 4.5, {"perplexity": 90.0, "f1": None}, 1.0))
    for number in range(after + 1, last + 1):
        tracker.step(step(number, peak=None if number == 1 else number))
        if number % 2 == 0:
            tracker.evaluated(Evaluation(number, 4.0, {"perplexity": 54.0}, 1.0))
    tracker.ended("finished", "")


def test_tensorboard_has_the_figures_and_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    told(tmp_path, 0, 4)
    told(tmp_path, 2, 5)  # killed after step 4, and resumed from the checkpoint of step 2
    read = scalars(tmp_path)
    assert read["train/loss"] == pytest.approx({n: 4.0 / n for n in range(1, 6)})
    assert read["train/peak_bytes"] == {n: n for n in range(2, 6)} and set(read["train/tokens"].values()) == {100}
    assert read["eval/loss"] == {0: 4.5, 2: 4.0, 4: 4.0} and set(read["eval/perplexity"]) == {0, 2, 4}
    assert {"train/gradient_norm", "train/learning_rate", "train/tokens_per_second", "eval/seconds"} <= read.keys()
    (settings,) = (tmp_path / "tensorboard").rglob("hparams.yml")
    assert "settings/steps: 5" in settings.read_text()
    told(tmp_path, 0, 1)  # a run that overwrites the other one
    assert scalars(tmp_path)["train/loss"] == {1: 4.0}


class Told:
    """In the place of one of accelerate's trackers: notes what it is made with and told."""

    made: ClassVar[list[tuple[tuple[object, ...], dict[str, object]]]] = []
    steps: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, *given: object, **named: object) -> None:
        self.made.append((given, named))
        self.tracker = self
        self.info = type("info", (), {"run_id": "f00"})

    def start(self) -> None:
        print("to stdout")  # noqa: T201

    def store_init_configuration(self, values: Mapping[str, object]) -> None:
        self.steps.append(("settings", len(values)))

    def log(self, values: Mapping[str, object], step: int) -> None:
        assert None not in values.values()
        self.steps.append((next(iter(values)), step))

    def finish(self) -> None:
        self.steps.append(("finish", 0))


@pytest.mark.parametrize(
    ("kind", "name", "key"), [("wandb", "WandB", "id"), ("trackio", "Trackio", "name"), ("mlflow", "MLflow", "run_id")]
)
def test_a_resumed_run_goes_on_in_the_run_of_the_tracker(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    name: str,
    key: str,
) -> None:
    monkeypatch.setattr(tracking, f"{name}Tracker", Told)
    monkeypatch.setattr(Told, "made", [])
    monkeypatch.setattr(Told, "steps", [])
    first, again = Tracker(kind, tmp_path), Tracker(kind, tmp_path)
    first.started(0, FACTS)
    for number in (1, 2, 3):
        first.step(step(number))
    first.evaluated(Evaluation(2, 1.0, {"f1": None}, 1.0))  # killed here
    again.started(2, FACTS)
    again.evaluated(Evaluation(2, 1.0, {}, 1.0))
    for number in (3, 4):
        again.step(step(number))
    again.ended("finished", "")
    assert Told.steps == [
        ("settings", 5),
        *(("train/loss", number) for number in (1, 2, 3)),
        ("eval/loss", 2),
        ("train/loss", 4),
        ("finish", 0),
    ]
    (_, one), (_, other) = Told.made
    given = "f00" if kind == "mlflow" else one[key]
    assert other[key] == given and (one.get("resume") == other.get("resume") == "allow" or kind == "mlflow")
    captured = capsys.readouterr()
    assert captured.out == "" and "to stdout" in captured.err


def test_a_tracker_that_cannot_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(tracking.TensorBoardTracker, "start", fail)
    said = r"the tracker tensorboard cannot start \(OSError: no network\); train without it"
    with pytest.raises(TrainingError, match=said):
        Tracker("tensorboard", tmp_path).started(0, FACTS)


def test_what_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ", ".join(TRACKERS)
    with pytest.raises(ConfigError, match=f"unknown trackers: tensorbord; known are {known}"):
        open_trackers(["tensorbord"], tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"is not installed; run: pip install wandb mlflow$"):
        open_trackers(["wandb", "mlflow"], tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigError, match="wandb has no key; run: wandb login, or set WANDB_MODE=offline"):
        open_trackers(["wandb"], tmp_path)
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n")
    assert [tracker.name for tracker in open_trackers(["wandb"], tmp_path)] == ["the tracker wandb"]
    assert open_trackers([], tmp_path) == []


def test_settings_become_one_level() -> None:
    expected = {"settings/steps": 5, "settings/patience": "None", "base/name": "m", "base/packed/nf4": 2, "list": "[1]"}
    assert flat(FACTS) == expected


def test_the_command_tells_tensorboard(
    run: Callable[..., subprocess.CompletedProcess[str]], tiny_folder: Path, tmp_path: Path
) -> None:
    data, folder = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("\n".join(json.dumps({"text": f"number {n}"}) for n in range(8)))
    words = ("train", "--model", tiny_folder, "--data", data, "--output", folder, "--rank", 2, "--steps", 2, "--json")
    done = run(*words, "--track", "tensorboard", "--eval-share", 0.25)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    read = scalars(folder)
    assert read["train/loss"][2] == pytest.approx(figures["last_loss"])
    assert read["eval/loss"] == pytest.approx({0: figures["held_out_loss_before"], 2: figures["held_out_loss_after"]})
    assert "track:" in (folder / "run.yaml").read_text()
    wrong = run(*words, "--track", "tensorbord", "--overwrite")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and "tensorbord" in wrong.stderr
