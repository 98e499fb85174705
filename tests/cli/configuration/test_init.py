"""Tests of `qlora-lite init`: what it asks, finds and writes."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lite.cli.configuration import init as module
from qlora_lite.errors import ConfigError
from qlora_lite.planning import batch_choice
from qlora_lite.planning.batch_choice import BatchChoice

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(qlora_lite: Command) -> Command:
    """Runs `qlora-lite` with these words and this input, which is empty if none is given."""
    return functools.partial(qlora_lite, stdin="")


@pytest.fixture
def place(memory_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and records, where prediction takes no time."""
    monkeypatch.chdir(memory_path)
    shutil.copytree(tiny_folder, memory_path / "model")
    records = [json.dumps({"prompt": f"say {n}", "completion": f"it is {n}"}) for n in range(60)]
    (memory_path / "data.jsonl").write_text("\n".join(records), encoding="utf-8")
    monkeypatch.setattr(
        batch_choice,
        "choose_batch",
        lambda model, wanted, memory: BatchChoice(wanted.rows, wanted.tokens, 1, "none", memory.size // 2),
    )
    return memory_path


def test_defaults_are_what_lies_nearby(command: Command, place: Path) -> None:
    status, printed, said = command("init", "--yes", "--json")
    assert status == 0, said
    figures = json.loads(printed.splitlines()[-1])
    assert figures["written"] == "run.yaml" and figures["next"] == "qlora-lite train run.yaml"
    assert (figures["steps"], figures["max_length"]) == (81, 64), "3 passes over 54 examples, in steps of 2"
    lines = (place / "run.yaml").read_text(encoding="utf-8").splitlines()
    assert {"model: model", "data: data.jsonl", "epochs: 3", "output: out/run", "eval_share: 0.1"} <= {*lines}
    status, printed, said = command("train", "run.yaml", "--print-config")
    assert status == 0 and "\nmax_length: 64\n" in printed and said == ""


def test_options_and_lines_answer_the_questions(command: Command, place: Path) -> None:
    (place / "out" / "run").mkdir(parents=True)
    status, printed, said = command("init", "a.yaml", "--epochs", 0.5, "--model", "model", stdin="data.jsonl\n4GiB\n\n")
    assert status == 0, said
    assert "Records [data.jsonl]: " in printed and "Memory to train in [" in printed and "Model" not in printed
    lines = (place / "a.yaml").read_text(encoding="utf-8").splitlines()
    assert {"epochs: 0.5", "output: out/run-2"} <= {*lines} and "of 4,096.0 MiB." in "\n".join(lines)


def test_of_another_task_it_is_told_that_the_memory_is_not_predicted(command: Command, place: Path) -> None:
    rows = [json.dumps({"text": f"number {n}", "label": "ab"[n % 2]}) for n in range(40)]
    (place / "labels.jsonl").write_text("\n".join(rows), encoding="utf-8")
    words = ("init", "--yes", "--data", "labels.jsonl", "--task", "sequence-classification")
    status, printed, said = command(*words)
    assert status == 0, said
    why = "The memory was not predicted: it is predicted for causal language models, and this one is made for sequence-"
    assert why in printed and "predicted peak" not in printed
    lines = (place / "run.yaml").read_text(encoding="utf-8").splitlines()
    assert {"task: sequence-classification", "batch_size: 1", "checkpointing: full"} <= {*lines}
    assert command("train", "run.yaml", "--print-config")[0] == 0


@pytest.mark.parametrize(
    ("words", "stdin", "sentence"),
    [
        (["there.yaml"], "", "there.yaml exists; name another file, or ask for overwrite"),
        (["run.json"], "", "the file must be named *.yaml or *.yml; got run.json"),
        (["--memory", "lots"], "", "--memory must be a size such as 300MiB or 5GB; got 'lots'"),
        (["--epochs", 0], "", "epochs must be a finite number above 0"),
        (["--output", "model"], "", "model is not empty"),
        (["--yes", "--output", "model/run"], "", "lies inside the input model; name another folder"),
        (["--yes", "--model", "missing"], "", "missing is not a local folder"),
        (["--yes", "--data", "missing.jsonl"], "", "missing.jsonl does not exist"),
        ([], "", "the answers ended before the question for --model"),
        ([], "model\ndata.jsonl\n4GiB\nmany\n", "--epochs must be a number of passes over the records, as 3"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(
    command: Command, place: Path, words: list[object], stdin: str, sentence: str
) -> None:
    (place / "there.yaml").write_text("mine", encoding="utf-8")
    status, _, said = command("init", *words, stdin=stdin)
    assert status in (1, 2) and sentence in said and len(said.splitlines()) == 1
    assert not (place / "run.yaml").exists() and (place / "there.yaml").read_text(encoding="utf-8") == "mine"


def test_a_file_is_replaced_if_that_is_asked_for(command: Command, place: Path) -> None:
    (place / "run.yaml").write_text("mine", encoding="utf-8")
    assert command("init", "--yes", "--overwrite")[0] == 0
    assert (place / "run.yaml").read_text(encoding="utf-8").startswith("# Written by qlora-lite init")


def test_what_lies_nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert module.nearby_data() is None and module.nearby_model() == module.SMALL_MODEL
    for name in ("a.csv", "notes.txt", "train.parquet"):
        (tmp_path / name).touch()
    assert module.nearby_data() == "train.parquet"
    size = module.free_memory()
    assert size.endswith(("GiB", "MiB")) and int(size[:-3]) > 0
    with pytest.raises(ConfigError, match="--data has no default here; give it"):
        (tmp_path / "a.csv").unlink()
        (tmp_path / "train.parquet").unlink()
        module.Asker(defaults=True).answer(module.Question("Records", "--data", module.nearby_data(), str, "a"), None)
