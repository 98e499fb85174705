"""The command `plan` and `train --memory-budget`, as processes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lite.cli.plan import memory_of
from qlora_lite.errors import ConfigError
from qlora_lite.planning.memory_plan import Memory

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_status_says_whether_it_fits(run: Run, tiny_folder: Path) -> None:
    words = ("plan", "--model", tiny_folder / "config.json", "--rank", 4, "--tokens", 32, "--seq", 16, "--json")
    done = run(*words, "--memory", "600MiB")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["fits"] is True and figures["memory"] == {
        "size": 600 << 20,
        "beside": 512 << 20,
        "accelerator": True,
        "beside_is": "assumed",
    }
    assert figures["largest"][0]["rows"] > 1 and figures["least_recomputation"]["checkpointing"] == "none"
    assert "1 x 32 tokens, checkpointing full: fits into 600.0 MiB" in done.stdout and "assumed" in done.stdout
    done = run(*words, "--memory", "100KiB", "--device", "cpu", "--beside", 0)
    assert done.returncode == 3, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["fits"] is False and figures["largest"][0]["rows"] == 0 and figures["forecast"]["reserved"] is None
    assert "does not fit into 100.0 KiB" in done.stdout and "none does, not even full" in done.stdout


def test_a_model_that_nobody_knows_is_one_sentence(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "quux"}')
    done = run("plan", "--model", config, "--memory", "1GiB")
    assert done.returncode == 1 and "model type `quux`" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--memory", "lots"), 2, "--memory must be a size such as 300MiB or 5GB; got 'lots'"),
        (("--memory", "1GiB", "--device", "abacus"), 2, "--device must be accelerator or cpu; got 'abacus'"),
        (("--memory", "1GiB", "--tokens", "4096"), 2, "tokens must be at most 2048"),
        (("--memory", "1GiB", "--optimizer", "sgd"), 2, "got 'sgd'"),
        ((), 2, "--memory"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Run, words: tuple[str, ...], status: int, message: str, tiny_folder: Path
) -> None:
    done = run("plan", "--model", tiny_folder, *words)
    assert done.returncode == status and message in done.stderr and "Traceback" not in done.stderr


def test_memory_of_a_process_is_measured_and_of_a_device_assumed() -> None:
    assert memory_of("1GiB", "accelerator", None) == Memory(1 << 30, 512 << 20, True, "assumed")
    assert memory_of("1GiB", "cpu", "3MiB") == Memory(1 << 30, 3 << 20, False)
    assert memory_of("1GiB", "cpu", None).beside > 50 << 20
    with pytest.raises(ConfigError, match="--beside must be"):
        memory_of("1GiB", "cpu", "much")


def test_training_within_a_budget_chooses_the_dial(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"number {n}"}) for n in range(8)))
    words = ("train", "--model", tiny_folder, "--data", data, "--output", tmp_path / "run", "--rank", 2, "--steps", 1)
    done = run(*words, "--memory-budget", "4GiB", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert "2 x 9 tokens within 4,096.0 MiB: checkpointing none, predicted peak" in done.stdout
    assert 0 < figures["predicted_peak_bytes"] < 4 << 30 and figures["peak_bytes"] > 0
    refused = run(*words, "--memory-budget", "4GiB", "--checkpointing", "full", "--overwrite")
    assert refused.returncode == 2 and "leave out one of it and --checkpointing" in refused.stderr
    small = run(*words, "--memory-budget", "1MiB", "--overwrite")
    assert small.returncode == 2 and "not even two tokens fit" in small.stderr and len(small.stderr.splitlines()) == 1
