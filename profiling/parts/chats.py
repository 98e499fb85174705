"""Chats for `tokenizing.py`, as JSON Lines: made from the words of Python's help texts, the same in every run.

A chat has one to three turns, and every third one begins with a system message. A text is a passage of the help texts.
The lengths of answers are log-normal, as those of instruction data are.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import random
from pathlib import Path

TURNS, SYSTEM_SHARE = (1, 2, 3), 1 / 3
SYSTEM_WORDS, QUESTION_WORDS = (8, 30), (4, 40)
# Of the logarithm of an answer's words: median and deviation. A chat of SmolLM2 then has about 300 tokens.
MEDIAN, SPREAD, MOST_WORDS = 3.65, 0.8, 1500


class Chats:
    """Draws chats."""

    def __init__(self, seed: int = 0) -> None:
        self._words = " ".join(text for _, text in sorted(pydoc_data.topics.topics.items())).split()
        self._generator = random.Random(seed)

    def _passage(self, count: int) -> str:
        start = self._generator.randrange(len(self._words) - count)
        return " ".join(self._words[start : start + count])

    def chat(self, turns: int | None = None) -> list[dict[str, str]]:
        """The messages of the next chat. turns: None draws their number."""
        draw = self._generator
        messages = []
        if draw.random() < SYSTEM_SHARE:
            messages.append({"role": "system", "content": self._passage(draw.randint(*SYSTEM_WORDS))})
        for _ in range(draw.choice(TURNS) if turns is None else turns):
            words = min(MOST_WORDS, max(1, round(draw.lognormvariate(MEDIAN, SPREAD))))
            messages.append({"role": "user", "content": self._passage(draw.randint(*QUESTION_WORDS))})
            messages.append({"role": "assistant", "content": self._passage(words)})
        return messages


def write_chats(path: Path, count: int) -> Path:
    """Writes the file and returns its path."""
    chats = Chats()
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"messages": chats.chat()}, ensure_ascii=False) + "\n")
    return path
