"""Marks around every piece of text that the author of a conversation wrote, which a chat template copies along.

A mark is a few characters of Unicode's private-use area: whether the piece starts or stops, and its number. A rendering
of marked messages says where each piece stands, however the template trims, quotes or reorders it.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_lite.data.chat.messages import Message

MARKS = 0xE000  # Unicode's private-use area
START, STOP, DIGITS = chr(MARKS), chr(MARKS + 1), MARKS + 0x10
MARK = re.compile(f"([{START}{STOP}])([{chr(DIGITS)}-{chr(DIGITS + 15)}]+)")
PRIVATE = re.compile(f"[{chr(MARKS)}-{chr(DIGITS + 15)}]")
# Templates look for these in a message's content. They stay outside of the marks.
TAGS = re.compile(r"(</?(?:think|thought|reasoning|tool_response|tool_call)>)")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Piece:
    """Text of the author: the message's index, the field it stands in, and the text without surrounding space."""

    message: int
    field: str
    text: str


@dataclass(frozen=True)
class Rendering:
    """A conversation as text.

    spans: (start, stop) of the characters of each piece that the template wrote; the first place of one that it wrote
    several times. repeated: the pieces of that kind.
    """

    text: str
    spans: Mapping[int, tuple[int, int]]
    repeated: frozenset[int] = frozenset()

    @functools.cached_property
    def order(self) -> list[tuple[int, int]]:
        """The spans from left to right."""
        return sorted(self.spans.values())

    @functools.cached_property
    def whole(self) -> int:
        """How many pieces from the first one on are written without a gap."""
        return next(number for number in itertools.count() if number not in self.spans)


def _digits(number: int) -> str:
    return "".join(chr(DIGITS + int(digit, 16)) for digit in f"{number:x}")


class MarkedMessages:
    """The messages of a conversation with marks around every piece of their text."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.pieces: list[Piece] = []
        self.numbers: dict[int, list[Piece]] = {}  # they bear no marks, by message
        self.messages = [self._message(index, message) for index, message in enumerate(messages)]

    def _text(self, message: int, name: str, text: str) -> str:
        parts = TAGS.split(text)
        return "".join(self._part(message, name, part) for part in parts)

    def _part(self, message: int, name: str, part: str) -> str:
        core = part.strip()
        if not core or TAGS.fullmatch(part):
            return part
        number, first = _digits(len(self.pieces)), part.index(core)
        self.pieces.append(Piece(message, name, core))
        return f"{part[:first]}{START}{number}{core}{STOP}{number}{part[first + len(core) :]}"

    def _value(self, message: int, name: str, value: object) -> object:
        """Strings anywhere inside of a JSON value."""
        if isinstance(value, str):
            return self._text(message, name, value)
        if isinstance(value, Mapping):
            return {key: self._value(message, f"{name}.{key}", part) for key, part in value.items()}
        if isinstance(value, list):
            return [self._value(message, f"{name}[{index}]", part) for index, part in enumerate(value)]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self.numbers.setdefault(message, []).append(Piece(message, name, json.dumps(value)))
        return value

    def _message(self, index: int, message: Message) -> dict[str, object]:
        marked = dict(message)
        content = message.get("content")
        if isinstance(content, str):
            marked["content"] = self._text(index, "content", content)
        elif isinstance(content, list):
            marked["content"] = [self._content_part(index, number, part) for number, part in enumerate(content)]
        for key in REASONING_KEYS:
            if isinstance(message.get(key), str):
                marked[key] = self._text(index, key, str(message[key]))
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            marked["tool_calls"] = [self._call(index, number, call) for number, call in enumerate(calls)]
        return marked

    def _content_part(self, index: int, number: int, part: object) -> object:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            return {**part, "text": self._text(index, f"content[{number}]", part["text"])}
        return part

    def _call(self, index: int, number: int, call: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
        name = f"tool_calls[{number}]"
        function = dict(call["function"])
        function["name"] = self._text(index, f"{name}.name", str(function["name"]))
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # JSON as text: its strings are marked inside of it
            value = self._value(index, f"{name}.arguments", json.loads(arguments))
            function["arguments"] = json.dumps(value, ensure_ascii=False)
        else:
            function["arguments"] = self._value(index, f"{name}.arguments", arguments)
        return {**call, "function": function}


def without_marks(marked: str) -> Rendering:
    """The text without its marks, and where each marked piece stands in it."""
    parts: list[str] = []
    starts: dict[int, int] = {}
    repeated: set[int] = set()
    spans: dict[int, tuple[int, int]] = {}
    done = length = 0
    for mark in MARK.finditer(marked):
        parts.append(marked[done : mark.start()])
        length += mark.start() - done
        done = mark.end()
        number = int("".join(f"{ord(digit) - DIGITS:x}" for digit in mark[2]), 16)
        if mark[1] == START and number in starts:
            repeated.add(number)
        elif mark[1] == START:
            starts[number] = length
        elif number in starts and number not in spans:
            spans[number] = (starts[number], length)
    return Rendering("".join([*parts, marked[done:]]), spans, frozenset(repeated))


def marks_in(messages: Sequence[Message]) -> bool:
    """Whether messages hold characters that marks are made of."""
    return PRIVATE.search(json.dumps(messages, ensure_ascii=False, default=str)) is not None
