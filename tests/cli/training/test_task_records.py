"""Tests of training runs for each task from the command line: labels, scores, and what is refused before it starts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.checkpoints.files import read_json
from qlora_lite.cli.training import task_records as module
from qlora_lite.errors import ConfigError

Run = Callable[..., subprocess.CompletedProcess[str]]
TASK = "sequence-classification"


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_classifier_is_trained_merged_and_named(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{'warm' if n % 2 else 'cold'} {n}", "label": "ab"[n % 2]} for n in range(24)]
    data, output = written(tmp_path / "d.jsonl", *rows), tmp_path / "run"
    words = ("train", "--model", tiny_folder, "--task", TASK, "--data", data, "--output", output, "--rank", 2)
    done = run(*words, "--steps", 6, "--batch-size", 6, "--learning-rate", 0.01, "--eval-share", 0.25, "--json")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "24 records (24 text and label), 24 examples" and lines[2] == "2 labels: a (12), b (12)"
    figures = json.loads(lines[-1])
    assert figures["accuracy_after"] == figures["f1_after"] == 1.0 and figures["accuracy_before"] < 0.9
    assert figures["held_out_loss_after"] < figures["held_out_loss_before"] and "perplexity_after" not in figures
    assert read_json(output / "data.json")["labels"] == {"a": 12, "b": 12}
    assert read_json(output / "adapter" / "labels.json") == {
        "id2label": {"0": "a", "1": "b"},
        "problem_type": "single_label_classification",
        "pad_token_id": 1,
    }


def options(model: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(model), "task": None, "regression": False, "packing": False, "memory_budget": None} | {
        "eval_generate": None,
        **changes,
    }


def test_the_task_is_that_of_the_option_or_of_the_checkpoint(tiny_folder: Path) -> None:
    assert module.task_with_records(options(tiny_folder)) is None
    assert module.task_with_records(options(tiny_folder, task="causal-lm")) is None
    for name in (TASK, "LlamaForSequenceClassification"):
        found = module.task_with_records(options(tiny_folder, task=name))
        assert found is not None and found.name == TASK


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"regression": True}, "--regression is for --task sequence-classification; leave it out"),
        ({"task": TASK, "packing": True}, "--packing is for causal language models"),
        ({"task": TASK, "memory_budget": "4GiB"}, "--memory-budget predicts causal language models"),
        ({"task": "chat"}, "task must be one of causal-lm, .*, or a class of transformers; got 'chat'"),
    ],
)
def test_what_a_task_does_not_take_is_refused(tiny_folder: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        module.task_with_records(options(tiny_folder, **changes))


def test_held_out_labels_that_are_not_trained_on_are_refused(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "d.jsonl", *({"text": "t", "label": label} for label in "ab"))
    other = written(tmp_path / "e.jsonl", {"text": "t", "label": "c"})
    words = ("train", "--model", tiny_folder, "--task", TASK, "--data", data, "--output", tmp_path / "run")
    done = run(*words, "--eval-data", other)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "held-out records have the label 'c', which no record to train on has (a, b)" in done.stderr


@pytest.mark.parametrize(("kind", "task"), [("Florence2", "image-text-to-text"), ("T5", "seq2seq-lm")])
def test_answers_of_a_model_that_writes_none_are_refused_before_anything_is_read(
    tmp_path: Path, kind: str, task: str
) -> None:
    import transformers

    architectures = [f"{kind}ForConditionalGeneration"]
    getattr(transformers, f"{kind}Config")(architectures=architectures).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"^--eval-generate is for causal .* is made for {task}; leave it out$"):
        module.task_with_records(options(tmp_path, eval_generate=4))


def test_pictures_are_not_asked_about(
    run: Run, import_script: Callable[[str], Any], tiny_vision_folder: Path, tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    parts = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what?"}]
    rows = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": f"{n}"}]} for n in "abcd"
    ]
    words = (
        "--model",
        tiny_vision_folder,
        "--data",
        written(tmp_path / "d.jsonl", *rows),
        "--output",
        tmp_path / "run",
    )
    done = run("train", *words, "--eval-share", 0.5, "--eval-generate", 2)
    assert done.returncode == 2 and "behind a prompt and without images; leave it out" in done.stderr, done.stderr
    done = run("train", *words, "--memory-budget", "4GiB")
    assert done.returncode == 2 and "--memory-budget predicts rows of text, and the records have images" in done.stderr
