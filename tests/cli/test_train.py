"""Tests of `qlora-lite train`: the choice of checkpointing, epochs, and outputs that it must not overwrite."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lite import LoraConfig
from qlora_lite.checkpoints.load import LoadReport
from qlora_lite.cli import train as module

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_the_data_is_never_overwritten(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "metrics.jsonl"
    data.write_text('{"text": "mine"}\n')
    done = run("train", "--model", tiny_folder, "--data", data, "--output", tmp_path, "--overwrite", "--steps", 1)
    assert done.returncode == 1 and "would replace the input" in done.stderr
    assert data.read_text() == '{"text": "mine"}\n'


def test_training_within_a_budget_chooses_the_checkpointing(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"number {n}"}) for n in range(8)))
    words = ("train", "--model", tiny_folder, "--data", data, "--output", tmp_path / "run", "--rank", 2, "--steps", 1)
    done = run(*words, "--memory-budget", "4GiB", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert "2 x 9 tokens within 4,096.0 MiB: checkpointing none, predicted peak" in done.stdout
    assert 0 < figures["predicted_peak_bytes"] < 4 << 30 and figures["peak_bytes"] > 0
    refused = run(*words, "--memory-budget", "4GiB", "--checkpointing", "full", "--overwrite")
    assert refused.returncode == 2 and "give it or --checkpointing, not both" in refused.stderr
    small = run(*words, "--memory-budget", "1MiB", "--overwrite")
    assert small.returncode == 2 and "not even two tokens fit" in small.stderr and len(small.stderr.splitlines()) == 1


def test_a_base_on_disk_trains_the_same_adapter(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = chats(tmp_path / "a.jsonl", 7)
    words = ("train", "--model", tiny_folder, "--data", data, "--rank", 2, "--steps", 2, "--no-token-cache")
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    for base in ("memory", "disk"):
        done = run(*words, "--output", tmp_path / base, "--base-in", base)
        assert done.returncode == 0, done.stderr
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    assert len([*(tmp_path / "cache" / "packed_bases").iterdir()]) == 1
    more = run(*words, "--output", tmp_path / "disk", "--overwrite", "--base-in", "disk", "--memory-budget", "4GiB")
    assert more.returncode == 0 and "within 4,096.0 MiB: checkpointing none" in more.stdout, more.stderr
    words = ("generate", "--model", tiny_folder, "--prompts", data, "--max-new-tokens", 2, "--base-in", "disk")
    answered = run(*words, "--output", tmp_path / "answers.jsonl", "--adapter", tmp_path / "disk" / "adapter")
    assert answered.returncode == 0, answered.stderr


def test_epochs_are_told_as_steps(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    data = chats(tmp_path / "a.jsonl", 7)
    words = ("train", "--model", tiny_folder, "--data", data, "--output", tmp_path / "run", "--rank", 2, "--json")
    done = run(*words, "--epochs", 2, "--batch-size", 2, "--gradient-accumulation", 3, "--schedule", "constant")
    assert done.returncode == 0, done.stderr
    assert "--epochs 2: 3 steps, and 4 batches in an epoch" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == [2e-4] * 3
    both = run(*words, "--epochs", 2, "--steps", 2, "--overwrite")
    assert both.returncode == 2 and "--steps and --epochs cannot be given together" in both.stderr


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def chats(path: Path, count: int, keys: tuple[str, str] = ("prompt", "completion")) -> Path:
    rows = [{keys[0]: f"say {n} {word}", keys[1]: word} for n in range(count) for word in WORDS[:1]]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_mixture_is_trained_on_and_a_share_is_held_out(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    one, other = chats(tmp_path / "a.jsonl", 20), chats(tmp_path / "b.jsonl", 10, ("q", "a"))
    output = tmp_path / "run"
    sources = ("--data", f"{one}=1", "--data", f"{other}=1", "--field", "prompt=q", "--field", "completion=a")
    words = ("train", "--model", tiny_folder, *sources, "--output", output, "--rank", 2, "--steps", 2)
    done = run(*words, "--limit", 9, "--eval-share", 0.25, "--learn", "all", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["examples"] == 14 and figures["examples_held_out"] == 4, "2 of 9 records of each source"
    assert figures["held_out_loss_before"] > 0 and figures["perplexity_after"] > 1
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"| held-out loss after | {figures['held_out_loss_after']:.6g} |" in card
    assert f"| loss of the last step | {figures['last_loss']:.6g} |" in card
    assert done.stdout.splitlines()[0] == "18 records (18 prompt and completion), 18 examples"
    notes = json.loads((output / "data.json").read_text(encoding="utf-8"))
    assert notes["duplicates"] == 9 and notes["examples_held_out"] == 4 and notes["sources"][0]["records"] == 9


def test_answers_are_compared_with_those_of_held_out_records(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    """The tiny model learns the one answer that all records have."""
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"say {n}", "completion": "a"}) for n in range(16)))
    words = ("train", "--model", tiny_folder, "--data", data, "--output", tmp_path / "run", "--json")
    words = (*words, "--format", "none", "--rank", 2)
    asked = ("--eval-share", 0.25, "--eval-steps", 6, "--eval-generate", 3, "--modules-to-save", "lm_head")
    asked = (*asked, "--best-by", "exact_match")
    done = run(*words, *asked, "--steps", 12, "--learning-rate", 0.05, "--batch-size", 4, "--schedule", "constant")
    assert done.returncode == 0, done.stderr
    assert "exact match: of 3 held-out examples with an answer of at most 64 tokens" in done.stdout
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["best_exact_match"] == 1.0
    assert figures["exact_match_before"] == 0.0 and figures["exact_match_after"] == 1.0 and figures["best_step"] > 0
    assert "step 12/12  held-out loss" in done.stderr and "exact match 1" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "exact_match" in line] == [0, 6, 12]
    alone = run(*words, "--eval-generate", 3, "--overwrite")
    assert alone.returncode == 2 and "--eval-generate needs held-out records" in alone.stderr
    unasked = run(*words, *asked[:4], "--best-by", "exact_match", "--overwrite")
    assert unasked.returncode == 2 and "exact_match goes by answers that are generated; give --eval-generate too" in (
        unasked.stderr
    )
    none = run(*words, *asked, "--learn", "all", "--overwrite")
    assert none.returncode == 2 and "--eval-generate found no held-out example with an answer" in none.stderr


def test_held_out_records_of_another_file_that_are_trained_on_too_are_told(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    one, other = chats(tmp_path / "a.jsonl", 6), chats(tmp_path / "b.jsonl", 3)
    words = ("train", "--model", tiny_folder, "--data", one, "--eval-data", other, "--output", tmp_path / "run")
    done = run(*words, "--rank", 2, "--steps", 1)
    assert done.returncode == 0, done.stderr
    assert "3 examples are held out" in done.stdout and "3 of the held-out examples are trained on too" in done.stdout
    both = run(*words, "--eval-share", 0.5, "--overwrite")
    assert both.returncode == 2 and "--eval-data and --eval-share both choose" in both.stderr


def test_layers_that_peft_loses_are_printed_before_the_first_step(
    small_model: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model("Qwen3MoeConfig", mlp_only_layers=[0])
    model.load_report = LoadReport()
    module._add_adapters_(model, LoraConfig(2, 4))
    assert capsys.readouterr().out.startswith("peft would not load the adapters of 3 layers (model.layers.0.mlp.gate_")
