"""Tests of `train` with a configuration: files, flags, printed settings, and runs that go on from their folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lite.training.metrics import StepMetrics
from qlora_lite.training.run_folder import RunFolder

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(qlora_lite: Command) -> Command:
    """Runs `qlora-lite train` with these words."""
    return functools.partial(qlora_lite, "train")


@pytest.fixture
def place(memory_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and run.yaml, in which commands run."""
    monkeypatch.chdir(memory_path)
    records = [json.dumps({"prompt": f"say {n}", "completion": f"it is {n}"}) for n in range(12)]
    (memory_path / "data.jsonl").write_text("\n".join(records), encoding="utf-8")
    lines = [f"model: {tiny_folder}", "data: data.jsonl", "output: out/run", "rank: 2", "dropout: 0.1", "steps: 4"]
    text = "\n".join([*lines, "save_steps: 2", "learning_rate: 1e-3", "token_cache: no", ""])
    (memory_path / "run.yaml").write_text(text, encoding="utf-8")
    return memory_path


def test_printed_settings_are_a_configuration_that_prints_the_same(command: Command, place: Path) -> None:
    status, printed, said = command("run.yaml", "--print-config")
    assert (status, said) == (0, "") and "\nlearning_rate: 0.001\n" in printed and "\noutput: out/run\n" in printed
    (place / "printed.yaml").write_text(printed, encoding="utf-8")
    assert command("printed.yaml", "--print-config") == (0, printed, "")
    assert {path.name for path in place.iterdir()} == {"data.jsonl", "run.yaml", "printed.yaml"}, "nothing is written"


def test_flags_have_precedence_over_the_file(command: Command, place: Path) -> None:
    def changed(*words: object) -> set[str]:
        plain, other = (command("run.yaml", *more, "--print-config")[1].splitlines() for more in ((), words))
        return {line for line in other if line not in plain}

    assert changed("--rank", 3, "--schedule", "linear") == {"rank: 3", "schedule: linear"}
    assert changed("--data", "b.jsonl", "--data", "c.jsonl") == {"data:", "- b.jsonl", "- c.jsonl"}
    assert "epochs: 2.0" in changed("--epochs", 2)
    assert changed("--token-cache", "--use-rslora") == {"token_cache: true", "use_rslora: true"}
    (place / "run.yaml").write_text((place / "run.yaml").read_text() + "use_rslora: true\n", encoding="utf-8")
    assert changed("--no-use-rslora") == {"use_rslora: false"}
    assert "\nsteps: null\n" in command("run.yaml", "--epochs", 2, "--print-config")[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["bad.yaml"], "unknown key lora_r in bad.yaml line 1; did you mean rank?"),
        (["run.yaml", "--print-config", "--steps", 1, "--epochs", 1], "--steps and --epochs cannot be given together"),
        (["run.yaml", "--print-config", "--rank", -1], "rank must be an integer of at least 1; got -1"),
        (["run.yaml", "--print-config", "--learn", "some"], "learn must be all, answers or last-answer, got some"),
        (["missing.yaml"], "missing.yaml does not exist"),
        (["."], ". holds a run; --resume goes on with it, --overwrite starts it again, and --output names"),
        (["empty", "--resume"], "empty has no run.yaml, so it is not the folder of a run"),
        (["rum.yaml"], "rum.yaml does not exist; expected a configuration; did you mean run.yaml?"),
        (["runs/nesage", "--resume"], "there is no run runs/nesage: name the folder of a run, or a configuration"),
        (["runs/nesage", "--resume"], "*.yaml; did you mean runs/message?"),
        (["rums/message", "--resume"], "*.yaml; did you mean runs/message?"),
        (["runs/x.yaml", "--resume"], "there is no run runs/x.yaml: name the folder"),
        (["runs/other", "--overwrite"], "*.yaml; runs has message"),
        (["data.jsonl"], "(records are given with --data)"),
        ([], "Missing option '--model'"),
        (["run.yaml", "--output", ".", "--overwrite"], "run.yaml was not written by a run"),
    ],
)
def test_wrong_configurations_are_one_sentence(
    command: Command, place: Path, words: list[object], sentence: str
) -> None:
    (place / "bad.yaml").write_text("lora_r: 8\n", encoding="utf-8")
    (place / "empty").mkdir()
    (place / "runs/message").mkdir(parents=True)
    (place / "runs/message/metrics.jsonl").touch()
    status, printed, said = command(*words)
    assert status in (1, 2) and printed == "" and sentence in said and len(said.splitlines()) == 1
    assert not (place / "out").exists()


def test_the_schema_needs_no_settings(command: Command, place: Path) -> None:
    status, printed, said = command("--print-schema")
    assert (status, said) == (0, "") and "learning_rate" in json.loads(printed)["properties"]


def test_a_killed_run_goes_on_from_its_folder_alone_to_the_bit(
    command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("run.yaml", "--output", "whole")[0] == 0
    real = RunFolder.finish_step

    def finish_step(writer: RunFolder, metrics: StepMetrics) -> None:
        real(writer, metrics)
        if metrics.step == 3:
            raise KeyboardInterrupt  # a second Ctrl-C: nothing more is saved

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish_step", finish_step)
        assert command("run.yaml")[0] == 130
    assert [path.name for path in (place / "out" / "run" / "checkpoints").iterdir()] == ["step-000002"]
    kept = (place / "out" / "run" / "run.yaml").read_text(encoding="utf-8")
    (place / "run.yaml").unlink()
    (place / "out" / "run").rename(place / "moved")
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    status, _, said = command(place / "moved", "--resume", "--keep-last", "all")
    assert status == 0 and "going on after step 2 from" in said
    adapters = [place / run / "adapter" / "adapter_model.safetensors" for run in ("whole", "moved")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    steps = [
        [json.loads(line)["loss"] for line in (place / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "moved")
    ]
    assert steps[0] == steps[1] and len(steps[0]) == 4
    again = (place / "moved" / "run.yaml").read_text(encoding="utf-8").splitlines()
    assert {f"data: {place}/data.jsonl", f"output: {place}/moved", "keep_last: all"} <= {*again}
    assert {line for line in again if line not in kept.splitlines()} == {f"output: {place}/moved", "keep_last: all"}
