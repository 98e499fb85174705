"""Tests of what a chat reads and shows; on a terminal by test_chat.py."""

from __future__ import annotations

import io

import pytest

from qlora_lite.cli.generation import lines
from qlora_lite.cli.generation.lines import Lines, shown


def test_a_pipe_is_read_by_lines_as_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\r\nzw\xc3\xb6lf\n\n\xff"), "latin-1"))
    read = Lines()
    assert not read.by_person and list(read.read()) == ["one", "zwölf", "", "\udcff"]
    with read.answering():
        assert not read.interrupted()


def test_a_terminal_gets_no_escape_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2J\x9b1m\té\n👍"
    assert shown(text) == text  # a file gets what the model wrote
    monkeypatch.setattr(lines, "is_terminal", lambda: True)
    assert shown(text) == "a\\x1b[2J\\x9b1m\té\n👍"
