"""Tests of `qlora-lite generate`: its file, a real kill, and its one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_a_killed_run_goes_on_with_the_same_command(run: Run, tiny_folder: Path, memory_path: Path) -> None:
    prompts, output = memory_path / "p.txt", memory_path / "a.jsonl"
    prompts.write_text("".join(f"{'x' * (number % 7)} {number}\n" for number in range(24)), encoding="utf-8")
    words = ("generate", "--model", tiny_folder, "--prompts", prompts, "--max-new-tokens", 8, "--batch-size", 2)
    words += ("--temperature", 1.5, "--json", "--output")
    found: list[subprocess.CompletedProcess[str]] = []
    thread = threading.Thread(target=lambda: found.append(run(*words, output)))
    thread.start()
    journal, lock = memory_path / "a.jsonl.partial", memory_path / "a.jsonl.lock"
    until = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < until and thread.is_alive(), found
        time.sleep(0.005)
    os.kill(int(lock.read_bytes()[1:]), signal.SIGKILL)
    thread.join()
    assert found[0].returncode == -signal.SIGKILL and not output.exists()
    refused = run(*words[:-2], "--seed", 1, "--output", output)
    assert refused.returncode == 1 and "of another run: seed was 0 and is 1; restore these" in refused.stderr
    done = run(*words, output)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["prompts"] == 24 and 2 <= figures["answered_before"] < 24
    assert {path.name for path in memory_path.iterdir()} == {"p.txt", "a.jsonl"}
    assert run(*words, memory_path / "b.jsonl").returncode == 0
    assert output.read_bytes() == (memory_path / "b.jsonl").read_bytes()
    shown = [json.loads(line)["prompt"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert shown == prompts.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (("--compare",), 2, "--compare sets base and adapter side by side, so it needs --adapter"),
        (("--batch-size", 0), 2, "--batch-size must be at least 1; got 0"),
        (("--output", "p.jsonl"), 1, "p.jsonl exists; name another file, or ask for overwrite"),
        (
            ("--output", "p.jsonl", "--overwrite"),
            1,
            "the output {folder}/p.jsonl would replace the input p.jsonl; name",
        ),
        (("--output", "a.txt"), 2, "the file must be named *.jsonl; got a.txt"),
        (("--seed", 1), 2, "seed 1 has no effect, since this model takes the likeliest token"),
        (
            ("--max-new-tokens", 2045),
            1,
            "p.jsonl, line 1: has 12 tokens and an answer of up to 2,045, and the model was",
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    run: Run,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
    status: int,
    error: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"text": "twelve chars"}\n', encoding="utf-8")
    named = () if "--output" in words else ("--output", "a.jsonl")
    done = run("generate", "--model", tiny_folder, "--prompts", "p.jsonl", *named, *words)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(f"error: {error.format(folder=tmp_path)}") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]
