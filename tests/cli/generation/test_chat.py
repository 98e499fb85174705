"""Tests of `qlora-lite chat`: on a terminal with real Ctrl-C, and on a pipe."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
CTRL_C, CTRL_D = "\x03", "\x04"


def answers(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_person_talks_and_ends_an_answer_by_ctrl_c(
    terminal: Callable[..., Any], tiny_folder: Path, adapter: Path
) -> None:
    screen = terminal("chat", "--model", tiny_folder, "--adapter", adapter, "--max-new-tokens", 1900)
    # A slow machine tells in a line how long loading took.
    assert screen.wait_for("(/help lists the commands)\n> ").endswith("adapters: loud*, off\n")
    screen.press("hello\n")
    screen.wait_for("hello\n")
    screen.press(CTRL_C)
    written = screen.wait_for("\n(ended by Ctrl-C)\n> ")
    assert 0 < len(written) < 1900  # the middle of an answer, and then the prompt again
    screen.press("/adapter off\n")
    screen.wait_for("adapters: loud, off*\n> ")
    screen.press("/adapter quiet\n")
    screen.wait_for("error: there is no adapter 'quiet'; there are: off, loud\n> ")
    screen.press("/reset\n")
    screen.wait_for("what was said is forgotten\n> ")
    screen.press("\x10\x10\x10\n")  # Ctrl-P three times: the line of three lines ago, by readline
    screen.wait_for("adapters: loud, off*\n> ")
    screen.press(CTRL_C)
    screen.wait_for("(Ctrl-C again, Ctrl-D or /exit ends the chat)\n> ")
    screen.press("/adapter loud\n")
    screen.wait_for("adapters: loud*, off\n> ")
    screen.press(CTRL_D)
    assert screen.ended() == 0, screen.screen


def test_ctrl_c_twice_ends_the_chat(terminal: Callable[..., Any], tiny_folder: Path) -> None:
    screen = terminal("chat", "--model", tiny_folder, "--format", "none")
    screen.wait_for("> ")
    screen.press(CTRL_C)
    screen.wait_for("ends the chat)\n> ")
    screen.press(CTRL_C)
    assert screen.ended() == 130
    assert screen.screen.endswith("the chat was ended by Ctrl-C\n")


def test_each_line_of_a_pipe_is_a_turn(run: Run, tiny_folder: Path, adapter: Path) -> None:
    words = ("chat", "--model", tiny_folder, "--adapter", adapter, "--max-new-tokens", 8, "--json")
    lines = "one\n\n//two\n/adapter off\n/reset\none\n/adapter loud\n/reset\none\n/exit\nnever\n"
    first, second, plain, again = answers(run(*words, stdin=lines))
    assert [one["adapter"] for one in (first, second, plain, again)] == ["loud", "loud", None, "loud"]
    assert first["answer"] == again["answer"] != plain["answer"]
    assert first["finish_reason"] == "length" and first["tokens"] == 8 and first["turns_dropped"] == 0
    (base,) = answers(run("chat", "--model", tiny_folder, "--max-new-tokens", 8, "--json", stdin="one"))
    assert base["answer"] == plain["answer"] and base["adapter"] is None
    (alone,) = answers(run(*words, stdin="/two"[1:]))
    assert alone["answer"] != second["answer"]  # the second turn was answered with the first one before it
    done = run(*words[:-1], stdin="one\n/help\n")
    assert done.returncode == 0 and done.stdout.startswith(f"{first['answer']}\n/reset ")


def test_seeded_draws_repeat_and_differ_from_turn_to_turn(run: Run, tiny_folder: Path) -> None:
    words = ("chat", "--model", tiny_folder, "--max-new-tokens", 12, "--temperature", 3, "--seed", 7, "--json")
    one, other = (answers(run(*words, stdin="a\n/reset\na\n")) for _ in range(2))
    assert [turn["answer"] for turn in one] == [turn["answer"] for turn in other]
    assert one[0]["answer"] != one[1]["answer"]


@pytest.mark.parametrize(
    ("words", "stdin", "status", "error"),
    [
        ((), "/adapter x\n", 2, "there is no adapter 'x'; there are: off"),
        ((), "/quit\n", 2, "'/quit' is not a command; there are /reset, /adapter NAME, /adapter off, /help and /exit"),
        (
            (),
            "a\udcffb\n",
            1,
            "chat: the message must be valid Unicode, got a lone surrogate at character 2; remove it",
        ),
        (
            ("--seed", 1),
            "a\n",
            2,
            "seed 1 has no effect, since this model takes the likeliest token; set a temperature",
        ),
        (
            ("--temperature", 0, "--top-p", 0.5),
            "",
            2,
            "top_p and temperature 0, which draws nothing, exclude each other",
        ),
        (
            ("--max-new-tokens", 2048),
            "",
            2,
            "max_new_tokens must leave room for a question in 2048 positions; got 2048",
        ),
        (("--adapter", "nothing"), "", 1, "nothing is not a folder; name that of an adapter"),
    ],
)
def test_what_cannot_be_is_one_line(
    run: Run, tiny_folder: Path, words: tuple[object, ...], stdin: str, status: int, error: str
) -> None:
    done = run("chat", "--model", tiny_folder, *words, stdin=stdin)
    assert done.returncode == status and done.stderr.startswith(f"error: {error}") and done.stderr.count("\n") == 1


def test_two_adapters_of_one_name_ask_for_names(run: Run, tiny_folder: Path, adapter: Path) -> None:
    words = ("chat", "--model", tiny_folder, "--max-new-tokens", 4, "--json", "--adapter")
    done = run(*words, adapter, "--adapter", adapter)
    assert done.returncode == 2 and f"'loud' names {adapter} already; name it otherwise, as --adapter se" in done.stderr
    turns = answers(run(*words, adapter, "--adapter", f"second={adapter}", stdin="a\n/adapter second\n/reset\na\n"))
    assert [turn["adapter"] for turn in turns] == ["loud", "second"] and turns[0]["answer"] == turns[1]["answer"]


def test_a_model_without_chat_template_says_what_to_do(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    done = run("chat", "--model", folder, stdin="a\n")
    assert done.returncode == 1 and done.stderr.startswith(
        "error: this tokenizer has no chat template; name an instruct "
    )
