"""Tests of `qlora-lite serve`: it runs until Ctrl-C, and what it refuses."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from qlora_lite.serving.server import listen

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_it_serves_until_ctrl_c(terminal: Callable[..., Any], tiny_folder: Path, adapter: Path) -> None:
    screen = terminal("serve", "--model", tiny_folder, "--adapter", adapter, "--port", 0, "--max-new-tokens", 1900)
    screen.wait_for("models: ")
    assert screen.wait_for("\n") == f"loud, {tiny_folder.name}"
    address = re.search(r"http://127\.0\.0\.1:\d+", screen.screen)
    assert address is not None
    with openai.OpenAI(base_url=f"{address[0]}/v1", api_key="none", max_retries=0, timeout=60) as client:
        assert client.completions.create(model="loud", prompt="a", max_tokens=2).choices[0].finish_reason == "length"
        stream = client.completions.create(model="loud", prompt="a", stream=True)
        next(iter(stream))
        screen.press("\x03")  # an answer that is being written does not keep it
        assert screen.ended() == 130
    assert screen.screen.endswith("stopped by SIGINT; nothing is left half-written\n")


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (
            ("--host", "0.0.0.0"),
            2,
            "others can reach the server at 0.0.0.0, so it needs a --token; or leave out --host",
        ),
        (("--token", "short"), 2, "--token must have at least 16 letters, digits and signs, without spaces"),
        (("--queue", -1), 2, "queue must be at least 0; got -1"),
        (("--time-limit", 0), 2, "time_limit must be above 0; got 0.0"),
        (("--adapter", "nothing"), 1, "nothing is not a folder; name that of an adapter"),
    ],
)
def test_what_cannot_be_is_one_line(
    run: Run, tiny_folder: Path, words: tuple[object, ...], status: int, error: str
) -> None:
    done = run("serve", "--model", tiny_folder, "--port", 0, *words)
    assert (done.returncode, done.stdout) == (status, "") and done.stderr == f"error: {error}\n"


def test_a_port_that_is_taken_is_named_before_the_model_is_read(run: Run, tiny_folder: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--model", tiny_folder, "--port", port)
    assert done.returncode == 2 and done.stderr.startswith(f"error: cannot listen at '127.0.0.1', port {port} (")
