"""Tests of questions: given answers, defaults, and answers that are wrong."""

from __future__ import annotations

import io
import sys

import pytest

from qlora_lite.cli.configuration.questions import Asker, Question
from qlora_lite.errors import ConfigError


def whole(text: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"not a number: {text}")
    return int(text)


QUESTION = Question("How many", "--many", "3", whole, "3")
WITHOUT_DEFAULT = Question("How many", "--many", None, whole, "3")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_option_answers_and_so_does_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert Asker().answer(QUESTION, "7") == 7 and Asker(defaults=True).answer(QUESTION, None) == 3
    for given, asker in (("x", Asker()), ("x", Asker(defaults=True))):
        with pytest.raises(ConfigError, match="not a number: x"):
            asker.answer(QUESTION, given)
    with pytest.raises(ConfigError, match="--many has no default here; give it"):
        Asker(defaults=True).answer(WITHOUT_DEFAULT, None)


def test_a_person_is_asked_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("x\n\n 5 \n"))
    assert Asker().answer(WITHOUT_DEFAULT, None) == 5
    said = capsys.readouterr().out
    assert "  not a number: x\n" in said and "  an answer is needed here, as 3\n" in said
    monkeypatch.setattr(sys, "stdin", Terminal("\n"))
    assert Asker().answer(QUESTION, None) == 3 and "How many [3]: " in capsys.readouterr().out


def test_a_pipe_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("4\nx\n"))
    asker = Asker()
    assert asker.answer(QUESTION, None) == 4
    with pytest.raises(ConfigError, match="not a number: x"):
        asker.answer(QUESTION, None)
    with pytest.raises(ConfigError, match="the answers ended before the question for --many; give it as an option"):
        asker.answer(QUESTION, None)
