"""Questions of a command: each has an answer on the command line, a default, and a check, and is asked again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from qlora_lite.errors import ConfigError, QLoRAError

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Asker:
    """Asks questions in the terminal, or of the lines of a pipe. defaults: takes every default without asking."""

    defaults: bool = False

    @property
    def by_person(self) -> bool:
        """Whether a person answers, who can correct an answer."""
        return sys.stdin.isatty()

    def answer(self, question: Question[Answer], given: str | None) -> Answer:
        """Returns the checked answer to a question. given: by its option, which is not asked then.

        Raises the error of the check for an answer that nobody can correct, and ConfigError if there is no answer.
        """
        if given is not None:
            return question.check(given)
        if self.defaults:
            if question.default is None:
                raise ConfigError(f"{question.option} has no default here; give it")
            return question.check(question.default)
        while True:
            text = self._line(question)
            try:
                if not text:
                    raise ConfigError(f"an answer is needed here, as {question.example}")
                return question.check(text)
            except (QLoRAError, OSError) as error:
                if not self.by_person:
                    raise
                print(f"  {' '.join(str(error).split())}")

    def _line(self, question: Question[Answer]) -> str:
        """Returns a line of the input, or the default for an empty one."""
        shown = "" if question.default is None else f" [{question.default}]"
        try:
            return input(f"{question.text}{shown}: ").strip() or question.default or ""
        except EOFError:
            print()
            raise ConfigError(
                f"the answers ended before the question for {question.option}; give it as an option, or ask for the "
                "defaults with --yes"
            ) from None


@dataclass(frozen=True)
class Question(Generic[Answer]):
    """One question. option: that answers it. default: as text; None if there is none. check: returns the answer.

    example: of an answer, for an error.
    """

    text: str
    option: str
    default: str | None
    check: Callable[[str], Answer]
    example: str
