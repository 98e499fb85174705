"""Where a chat template writes each answer of a conversation: one rendering, and the characters that are learned.

The conversation is rendered twice: as it is, and with marks of a private-use area around every piece of text that its
author wrote. A template copies marks along with the text. Without its marks the second rendering has to equal the
first; then the marks tell where each piece stands, however the template trims, quotes or reorders it.

An answer is learned from the end of its generation prompt to the end of its turn. Both are read from the template: the
rendering of the conversation up to the answer, with and without the answer. An answer *stands* in the rendering of a
longer conversation if that begins with the rendering that ends with the answer. Where it does not, since the template
rewrites history (Qwen3 drops earlier thinking, Phi-3 ends only the last turn), the answer needs a rendering of its own.

Renderings up to an answer are compared once for each shape of an answer and of the template's text around it, and
remembered. So the work grows linearly with the length of a conversation.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qlora_lite.data.chat.marks import MarkedMessages, Rendering, without_marks
from qlora_lite.data.chat.messages import ASSISTANT, Message
from qlora_lite.errors import CheckpointError, listing

Write = Callable[[Sequence[Message], bool], str]
SpecialAt = Callable[[str, int], int]

# What a template writes for an answer without reasoning. It is not learned.
EMPTY_REASONING = re.compile(
    r"(?:<think>\s*</think>|<\|START_THINKING\|>\s*<\|END_THINKING\|>|<\|channel>thought\s*<channel\|>)\s*"
)
OPENED_TWICE = re.compile(r"<think>\s*(?:</think>\s*)?<think>\s*\Z")


class ChatTemplateError(CheckpointError):
    """A chat template cannot write a conversation, or leaves out text that its author wrote."""


@dataclass(frozen=True)
class LearnedText:
    """A rendering of a conversation, or of its beginning, and what is learned of it.

    spans: (start, stop) of the characters of each answer, its end included. answers: the indices of their messages.
    is_open: whether the template ends no turn, so that an end-of-sequence token has to follow the last answer.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    answers: tuple[int, ...]
    is_open: bool


@dataclass(frozen=True)
class _Borders:
    """Characters that belong to an answer in front of its first piece, and behind its last one."""

    before: int
    behind: int


@dataclass(frozen=True)
class _Turn:
    """How a template opens an answer that follows a user's message, and whether it writes anything behind it."""

    opening: str
    is_ended: bool


@dataclass
class KnownShapes:
    """What was found of answers of one shape, for all conversations of one template. None: such an answer does not
    stand in a rendering that goes on."""

    borders: dict[tuple[Hashable, ...], _Borders | None] = field(default_factory=dict)
    turns: dict[bool, _Turn] = field(default_factory=dict)  # by whether contents are lists of parts


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


class Conversation:
    """A conversation under a chat template.

    messages: in a form that the template can write. write: `(messages, for_generation)` -> text. special_at: `(text,
    position)` -> the length of the special token that begins there, or 0. known: what earlier conversations showed of
    the template's answers; `setting` distinguishes what else the template was given (tools).
    """

    def __init__(
        self,
        messages: Sequence[Message],
        write: Write,
        special_at: SpecialAt,
        known: KnownShapes,
        setting: Hashable = None,
    ) -> None:
        self._messages, self._write, self._special_at, self._known = messages, write, special_at, known
        self._marked = MarkedMessages(messages)
        roles = [str(message["role"]) for message in messages]
        self._setting = (setting, "system" in roles or "developer" in roles)
        self._of: list[list[int]] = [[] for _ in messages]
        for number, piece in enumerate(self._marked.pieces):
            self._of[piece.message].append(number)
        self._earlier: list[int | None] = []  # the answer before each message
        earlier = None
        for index, role in enumerate(roles):
            self._earlier.append(earlier)
            earlier = index if role == ASSISTANT else earlier

    def rendering(self, count: int) -> Rendering:
        """The first `count` messages. Raises ChatTemplateError if marks change what the template writes."""
        text = self._write(self._messages[:count], False)
        marked = without_marks(self._write(self._marked.messages[:count], False))
        if marked.text != text:
            raise ChatTemplateError("the chat template computes with the text of messages, so answers cannot be found")
        asked = [index for index, message in enumerate(self._messages[:count]) if message["role"] != ASSISTANT]
        self._check_written(marked, [number for index in asked for number in self._of[index]])
        return marked

    def _check_written(self, rendering: Rendering, numbers: Iterable[int]) -> None:
        pieces = [self._marked.pieces[number] for number in numbers if number not in rendering.spans]
        if pieces:
            lost = dict.fromkeys(f"messages[{piece.message}].{piece.field}" for piece in pieces)
            raise ChatTemplateError(f"the chat template leaves out {listing(lost)}")

    def learned(self, answers: Iterable[int]) -> list[LearnedText]:
        """As few renderings as learn each of these messages as it is generated, shortest first.

        Raises ChatTemplateError, naming the fields, if the template leaves out text of an answer.
        """
        found: list[LearnedText] = []
        left = sorted(answers)
        count = len(self._messages)
        while left:
            rendering = self.rendering(count)
            borders = {index: self._borders(rendering, index, count) for index in left}
            if borders[left[-1]] is None:
                count = left[-1] + 1  # it stands in its own rendering only
                continue
            standing = [index for index in left if borders[index] is not None]
            found.append(self._learned(rendering, standing, borders))
            left = [index for index in left if borders[index] is None]
            count = left[-1] + 1 if left else 0
        return found[::-1]

    def _learned(
        self, rendering: Rendering, standing: list[int], borders: Mapping[int, tuple[int, int] | None]
    ) -> LearnedText:
        spans = tuple(span for index in standing if (span := borders[index]) is not None)
        is_last = not rendering.text[spans[-1][1] :].strip()
        return LearnedText(rendering.text, spans, tuple(standing), is_last and not self._turn().is_ended)

    def _borders(self, rendering: Rendering, index: int, count: int) -> tuple[int, int] | None:
        """(start, stop) of an answer, or None if it does not stand in this rendering of `count` messages."""
        pieces = self._of[index]
        if not pieces or any(number not in rendering.spans for number in pieces):
            return self._compared(rendering, index, count)
        first = min(rendering.spans[number][0] for number in pieces)
        last = max(rendering.spans[number][1] for number in pieces)
        if pieces[0] > rendering.whole:  # the template left out a piece before: it rewrote history
            return self._compared(rendering, index, count)
        shape = self._shape(rendering, index, first, last, index + 1 == count)
        if shape not in self._known.borders:
            span = self._compared(rendering, index, count)
            self._known.borders[shape] = span and _Borders(first - span[0], span[1] - last)
        borders = self._known.borders[shape]
        return None if borders is None else (first - borders.before, last + borders.behind)

    def _shape(self, rendering: Rendering, index: int, first: int, last: int, is_last: bool) -> tuple[Hashable, ...]:
        """What decides where an answer begins and ends: its fields, and the template's own text around the pieces since
        the answer before."""
        earlier = self._earlier[index]
        begin = 0
        if earlier is not None:
            begin = min(
                max((rendering.spans[n][1] for n in self._of[earlier] if n in rendering.spans), default=0), first
            )
        order = rendering.order
        frames, place = [], begin
        for start, stop in order[bisect_left(order, (begin, begin)) : bisect_right(order, (last, last))]:
            frames.append(rendering.text[place:start])
            place = max(place, stop)
        next_one = bisect_left(order, (last, last))
        behind = order[next_one][0] if next_one < len(order) else len(rendering.text)
        fields = tuple(self._marked.pieces[number].field for number in self._of[index])
        return (self._setting, fields, tuple(frames), rendering.text[last:behind], is_last, earlier is None)

    def _compared(self, rendering: Rendering, index: int, count: int) -> tuple[int, int] | None:
        """The same, by comparing the renderings that end before and with the answer."""
        own = rendering if index + 1 == count else self.rendering(index + 1)
        pieces = self._of[index]
        self._check_written(own, pieces)
        last = max((own.spans[number][1] for number in pieces), default=0)
        prompt = self._prompt(index, own)
        if early := [number for number in pieces if number in own.repeated and own.spans[number][0] < prompt]:
            names = dict.fromkeys(f"messages[{index}].{self._marked.pieces[number].field}" for number in early)
            raise ChatTemplateError(f"the chat template writes {listing(names)} in the prompt too")
        first = min((own.spans[number][0] for number in pieces), default=len(own.text.rstrip()))
        start = self._start(own.text, min(prompt, first), first)
        last = max(last, start)
        stop = last + len(own.text[last:].rstrip())
        self._check_answer(index, own.text, start, first, stop)
        if not rendering.text.startswith(own.text[:stop]):
            return None
        if own is not rendering and not self._turn().is_ended:  # the token that begins the next turn ends this one
            following = self._special_at(rendering.text, stop)
            return (start, stop + following) if following else None
        return start, stop

    def _start(self, text: str, prompt: int, first: int) -> int:
        """Where the learned part of an answer begins whose first piece is at `first`: behind the generation prompt, and
        behind an opening of a turn or an empty block of reasoning that only the template wrote."""
        start, opening = prompt, self._turn().opening
        if opening and (place := text.rfind(opening, max(0, prompt - len(opening)), first)) >= 0:
            start = max(start, place + len(opening))
        empty = [match.end() for match in EMPTY_REASONING.finditer(text, 0, first) if match.end() > start]
        return min(max([start, *empty]), first)

    def _turn(self) -> _Turn:
        in_parts = any(isinstance(message.get("content"), list) for message in self._messages)
        if in_parts not in self._known.turns:
            contents = [[{"type": "text", "text": text}] if in_parts else text for text in ("question", "answer")]
            asked: list[Message] = [{"role": "user", "content": contents[0]}]
            opening = self._write(asked, True).removeprefix(self._write(asked, False))
            answered = self._write([*asked, {"role": ASSISTANT, "content": contents[1]}], False).rstrip()
            self._known.turns[in_parts] = _Turn(opening, not answered.endswith("answer"))
        return self._known.turns[in_parts]

    def _check_answer(self, index: int, text: str, start: int, first: int, stop: int) -> None:
        """Numbers bear no marks, and some templates write `None` for an answer that is a call alone."""
        lost = [piece for piece in self._marked.numbers.get(index, ()) if piece.text not in text[start:stop]]
        if lost:
            names = listing(f"messages[{index}].{piece.field}" for piece in lost)
            raise ChatTemplateError(f"the chat template leaves out {names}")
        if OPENED_TWICE.search(text[:first]):
            raise ChatTemplateError(f"the chat template opens the thinking of messages[{index}] twice")
        if self._messages[index].get("content") is None and re.search(r"\bNone\b|\bnull\b", text[start:first]):
            raise ChatTemplateError(f"the chat template writes None for the missing content of messages[{index}]")

    def _prompt(self, index: int, own: Rendering) -> int:
        """How many characters of the rendering that ends with an answer are its generation prompt."""
        try:
            text = self._write(self._messages[:index], True)
        except CheckpointError:  # most templates refuse a conversation without messages
            if index:
                raise
            opening = self._turn().opening
            place = own.text.find(opening)
            return place + len(opening) if opening and place >= 0 else 0
        if own.text.startswith(text):
            return len(text)
        # The template writes earlier messages differently before the answer and with it: what counts is the text behind
        # the last piece of the prompt.
        prompt = without_marks(self._write(self._marked.messages[:index], True))
        for number, (_, stop) in sorted(prompt.spans.items(), key=lambda item: -item[1][1]):
            if number in own.spans:
                place = own.spans[number][1]
                return place + common_length(prompt.text[stop:], own.text[place:])
        return common_length(text, own.text)
