"""How a chat template opens and ends an answer, and what it writes there by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from qlora_lite.data.chat.messages import ASSISTANT, Message
from qlora_lite.errors import CheckpointError

Write = Callable[[Sequence[Message], bool], str]
SpecialAt = Callable[[str, int], int]
Span = tuple[int, int]

# What a template writes for an answer without reasoning.
EMPTY_REASONING = re.compile(
    r"(?:<think>\s*</think>|<\|START_THINKING\|>\s*<\|END_THINKING\|>|<\|channel>thought\s*<channel\|>)\s*"
)
LONGEST_SPECIAL = 64
MOST_SHAPES = 4096


class ChatTemplateError(CheckpointError):
    """A chat template cannot write a conversation, or leaves out text that its author wrote."""


@dataclass(frozen=True)
class Writer:
    """How a chat template writes a conversation.

    write: `(messages, for_generation)` -> text. special_at: `(text, position)` -> the length of the special token that
    begins there, or 0. write_marked: as `write`, with marks around what the template says is generated; None if it says
    nothing. learn_empty_reasoning: whether an empty block of reasoning that the template adds is learned.
    """

    write: Write
    special_at: SpecialAt
    write_marked: Write | None = None
    learn_empty_reasoning: bool = False


@dataclass(frozen=True)
class Turn:
    """How a template opens an answer that follows a user's message, and whether it writes anything behind it."""

    opening: str
    is_ended: bool


@dataclass(frozen=True)
class Borders:
    """Characters that belong to an answer in front of its first piece, and behind its last one."""

    before: int
    behind: int


@dataclass
class KnownShapes:
    """What was found of answers of one shape, for all conversations of one template.

    borders: None for an answer that does not stand in a rendering that goes on.
    """

    borders: dict[tuple[Hashable, ...], Borders | None] = field(default_factory=dict)
    _turns: dict[tuple[Hashable, bool], Turn] = field(default_factory=dict)

    def remember(self, shape: tuple[Hashable, ...], borders: Borders | None) -> None:
        """Keeps what was found, and forgets everything before if that became too much."""
        if len(self.borders) >= MOST_SHAPES:
            self.borders.clear()
        self.borders[shape] = borders

    def turn(self, writer: Writer, setting: Hashable, in_parts: bool) -> Turn:
        """How the template opens and ends answers. in_parts: contents are lists of parts."""
        key = (setting, in_parts)
        if key not in self._turns:
            if len(self._turns) >= MOST_SHAPES:
                self._turns.clear()
            self._turns[key] = _turn(writer, in_parts)
        return self._turns[key]


def _turn(writer: Writer, in_parts: bool) -> Turn:
    contents = [[{"type": "text", "text": text}] if in_parts else text for text in ("question", "answer")]
    asked: list[Message] = [{"role": "user", "content": contents[0]}]
    before, prompt = writer.write(asked, False), writer.write(asked, True)
    answered = writer.write([*asked, {"role": ASSISTANT, "content": contents[1]}], False).rstrip()
    return Turn(prompt[common_tokens(before, prompt, writer.special_at) :], not answered.endswith("answer"))


def common_tokens(one: str, other: str, special_at: SpecialAt) -> int:
    """How many characters both begin with, without a part of a special token of the other."""
    common = common_length(one, other)
    if common < len(one):
        for place in range(max(0, common - LONGEST_SPECIAL), common):
            if special_at(other, place) > common - place:
                return place
    return common


def common_length(one: str, other: str) -> int:
    """How many characters both begin with."""
    if other.startswith(one):
        return len(one)
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def generation_start(text: str, prompt: int, first: int, turn: Turn, learn_empty_reasoning: bool) -> int:
    """Where the learned part of an answer begins whose first piece is at `first`.

    That is behind the generation prompt (`prompt` characters long), behind an opening of a turn, and, unless it is
    learned, behind an empty block of reasoning that only the template wrote.
    """
    start, opening = prompt, turn.opening
    if opening and (place := text.rfind(opening, max(0, prompt - len(opening)), first)) >= 0:
        start = max(start, place + len(opening))
    if not learn_empty_reasoning:
        start = max([start, *(match.end() for match in EMPTY_REASONING.finditer(text, 0, first))])
    return min(start, first)
