"""Tests of `qlora-lite plan` as a process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_status_says_whether_it_fits(run: Run, tiny_folder: Path) -> None:
    words = ("plan", "--model", tiny_folder / "config.json", "--rank", 4, "--tokens", 32, "--seq", 16, "--json")
    done = run(*words, "--memory", "600MiB")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["fits"] is True and figures["memory"] == {
        "size": 600 << 20,
        "overhead": 512 << 20,
        "accelerator": True,
        "overhead_source": "assumed",
        "in_shares": 0,
    }
    assert figures["largest"][0]["rows"] > 1 and figures["least_recomputation"]["checkpointing"] == "none"
    assert "1 x 32 tokens, checkpointing full: fits into 600.0 MiB" in done.stdout and "assumed" in done.stdout
    done = run(*words, "--memory", "100KiB", "--device", "cpu", "--overhead", 0)
    assert done.returncode == 3, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["fits"] is False and figures["largest"][0]["rows"] == 0 and figures["forecast"]["reserved"] is None
    assert "does not fit into 100.0 KiB" in done.stdout and "none, not even checkpointing full" in done.stdout


def test_a_base_in_shares_is_counted_and_planned_with(run: Run, tiny_folder: Path) -> None:
    words = ("plan", "--model", tiny_folder / "config.json", "--rank", 4, "--tokens", 16, "--seq", 16, "--json")
    cpu = ("--memory", "100MiB", "--device", "cpu", "--overhead", 0)
    alone, shared = (json.loads(run(*words, *cpu, *more).stdout.splitlines()[-1]) for more in ((), ("--processes", 2)))
    shares = shared["shares"]
    saved = shares["whole"] - shares["share"] - shares["gathered"]
    assert shared["memory"]["in_shares"] == saved and "shares" not in alone
    # Tables of a few KiB, which packing makes once in a process, are not counted a second time.
    assert abs(alone["needed"] - shared["needed"] - saved) < 8 << 10
    done = run(*words, *cpu, "--processes", 1)
    assert done.returncode == 2 and "a base in shares needs at least 2 processes; got 1" in done.stderr


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
        (("--memory", "1GiB", "--overhead", "much"), 2, "--overhead must be a size such as 300MiB or 5GB; got 'much'"),
        (("--memory", "1GiB", "--tokens", "1"), 2, "tokens must be at least 2 and at most 16,777,216; got 1"),
        (("--memory", "1GiB", "--optimizer", "sgd"), 2, "got 'sgd'"),
        ((), 2, "--memory"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Run, words: tuple[str, ...], status: int, message: str, tiny_folder: Path
) -> None:
    done = run("plan", "--model", tiny_folder, *words)
    assert done.returncode == status and message in done.stderr and "Traceback" not in done.stderr
