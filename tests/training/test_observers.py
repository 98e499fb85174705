"""Tests of what is told of a run: events.jsonl, and observers."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite import LoraConfig, TrainConfig, add_lora_
from qlora_lite.data.stream import BatchStream
from qlora_lite.errors import NotFiniteError, Stopped
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.progress.work import progress_shown
from qlora_lite.training.loop import train
from qlora_lite.training.metrics import Evaluation, StepMetrics
from qlora_lite.training.observers import run_facts
from qlora_lite.training.run_folder import run_folder
from qlora_lite.training.run_state import Run


class Recorder:
    """Notes what it is told. fails_in: the call, by name, that raises."""

    def __init__(self, fails_in: str = "") -> None:
        self.name, self.fails_in = "recorder", fails_in
        self.told: list[tuple[object, ...]] = []

    def _note(self, call: str, *given: object) -> None:
        self.told.append((call, *given))
        if call == self.fails_in:
            raise OSError("no space\nleft")

    def started(self, step: int, facts: Mapping[str, object]) -> None:
        self._note("started", step, facts["settings"]["steps"])  # type: ignore[index]

    def step(self, metrics: StepMetrics) -> None:
        self._note("step", metrics.step)

    def evaluated(self, evaluation: Evaluation) -> None:
        self._note("evaluated", evaluation.step)

    def ended(self, event: str, reason: str) -> None:
        self._note("ended", event, reason)


def run_of(steps: int = 100) -> Run:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_lora_(layers, LoraConfig(rank=2, alpha=4, target_modules=["0"]))
    optimizer = torch.optim.SGD([torch.zeros(1)])
    return Run(layers, adapter_parameters(layers), optimizer, TrainConfig(steps), BatchStream([], None, None))


def metrics(step: int) -> StepMetrics:
    return StepMetrics(step, 2.0, 1.0, 1e-4, 8, 1.0, None)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_facts_of_a_run() -> None:
    facts: Any = run_facts(run_of(7))
    assert facts["settings"]["steps"] == 7 and facts["settings"]["learning_rate"] == 2e-4
    assert facts["base"] == {"name": "Sequential", "class": "Sequential", "packed": {}}
    assert facts["adapters"] == {"layers": 1, "rank": 2, "alpha": 4, "variant": "lora", "trained_parameters": 16}


def test_a_run_that_ends_is_told_from_its_first_step_on(tmp_path: Path) -> None:
    observer, folder = Recorder(), tmp_path / "run"
    with run_folder(run_of(2), folder, overwrite=False, observers=[observer]) as writer:
        writer.finish_evaluation(Evaluation(0, 3.0, {}, 1.0))
        assert observer.told == [] and not (folder / "events.jsonl").exists(), "told before the first step was done"
        for step in (1, 2):
            writer.finish_step(metrics(step))
        writer.finish_evaluation(Evaluation(2, 2.0, {}, 1.0))
    assert observer.told == [
        ("started", 0, 2),
        ("evaluated", 0),
        ("step", 1),
        ("step", 2),
        ("evaluated", 2),
        ("ended", "finished", ""),
    ]
    first, last = events(folder)
    assert (first["event"], first["step"], first["settings"]["steps"]) == ("started", 0, 2)
    assert first["time"].endswith("+00:00") and last["event"] == "finished" and last["early"] is False
    with run_folder(run_of(4), folder, overwrite=True) as writer:
        writer.finish_step(metrics(1))
    assert [event["event"] for event in events(folder)] == ["started", "finished"] and events(folder)[1]["early"]


@pytest.mark.parametrize(
    ("error", "event", "reason"),
    [
        (Stopped(signal.SIGTERM, "stop"), "stopped", "SIGTERM"),
        (NotFiniteError("the loss is\nnan"), "failed", "NotFiniteError: the loss is nan"),
        (KeyboardInterrupt(), None, ""),
    ],
)
def test_how_a_run_ended_is_noted(tmp_path: Path, error: BaseException, event: str | None, reason: str) -> None:
    observer = Recorder()
    writing = run_folder(run_of(), tmp_path / "run", overwrite=False, observers=[observer])
    with pytest.raises(type(error)), writing as writer:
        writer.finish_step(metrics(1))
        writer._checkpoint_step = 1  # there is no state to write
        raise error
    told = events(tmp_path / "run")[1:]
    assert [(line["event"], line["step"], line["reason"]) for line in told] == ([(event, 1, reason)] if event else [])
    assert observer.told[2:] == ([("ended", event, reason)] if event else [])


def test_an_observer_that_fails_is_lost_with_a_sentence_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, kept = Recorder("step"), Recorder()
    with progress_shown(), run_folder(run_of(), tmp_path / "run", overwrite=False, observers=[lost, kept]) as writer:
        writer.finish_step(metrics(1))
        writer.finish_step(metrics(2))
    assert [told[0] for told in lost.told] == ["started", "step"]
    assert [told[0] for told in kept.told] == ["started", "step", "step", "ended"]
    said = "recorder failed after step 1 and is told nothing more: OSError: no space left"
    assert capsys.readouterr().err.splitlines() == [said]
    noted = events(tmp_path / "run")[1]
    assert noted["event"] == "observer_lost" and noted["step"] == 1
    assert noted["observer"] == "recorder" and noted["reason"] == "OSError: no space left"


def test_an_observer_that_cannot_start_ends_the_run(tmp_path: Path) -> None:
    writing = run_folder(run_of(), tmp_path / "run", overwrite=False, observers=[Recorder("started")])
    with pytest.raises(Exception, match="no space"), writing as writer:
        writer.finish_step(metrics(1))
    assert [event["event"] for event in events(tmp_path / "run")] == ["started", "failed"]


def test_a_resumed_run_is_told_where_it_went_on(
    small_model: Callable[..., Any], memory_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.randint(64, (2, 8))
    batches, held_out = [{"input_ids": ids, "labels": ids}], [{"input_ids": ids, "labels": ids}]
    for steps, observer in ((2, Recorder()), (3, Recorder())):
        model = small_model("LlamaConfig", num_hidden_layers=1)
        add_lora_(model, LoraConfig(rank=2, target_modules=["q_proj"]))
        config = TrainConfig(3, save_steps=1)
        if steps == 2:
            observer.step = lambda told: _stop_after(told, 2)  # type: ignore[method-assign]
        options: dict[str, Any] = {"eval_batches": held_out, "observers": [observer], "resume": steps == 3}
        try:
            train(model, batches, config, output_dir=memory_path / "run", **options)
        except Stopped:
            assert steps == 2
            with open(memory_path / "run" / "events.jsonl", "a") as file:
                file.write('{"event": "cut by a ki')
    assert observer.told == [("started", 2, 3), ("step", 3), ("evaluated", 3), ("ended", "finished", "")]
    lines = (memory_path / "run" / "events.jsonl").read_text().splitlines()
    assert lines.pop(2) == '{"event": "cut by a ki'  # it keeps its line, and the next event has one of its own
    names = [(event["event"], event["step"]) for event in map(json.loads, lines)]
    assert names == [("started", 0), ("stopped", 2), ("resumed", 2), ("finished", 3)]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("step ", "going on"))]
    assert lines[0].startswith("step 0/3  held-out loss") and lines[1].startswith("step 1/3  loss ")
    assert "going on after step 2 from" in lines[3] and lines[4].startswith("step 3/3  loss ")


def _stop_after(metrics: StepMetrics, step: int) -> None:
    if metrics.step == step:
        signal.raise_signal(signal.SIGTERM)


def test_random_numbers_of_observers_are_not_those_of_the_run(tmp_path: Path) -> None:
    class Drawing(Recorder):
        def step(self, metrics: StepMetrics) -> None:
            torch.rand(3)

        def started(self, step: int, facts: Mapping[str, object]) -> None:
            torch.rand(3)

    torch.manual_seed(1)
    with run_folder(run_of(), tmp_path / "run", overwrite=False, observers=[Drawing()]) as writer:
        before = torch.get_rng_state()
        writer.finish_step(metrics(1))
        assert torch.equal(torch.get_rng_state(), before)
