"""Marks around every piece of text that the author of a conversation wrote, which a chat template copies along.

A mark is a few characters of Unicode's private-use area: whether the piece starts or stops, and its number. A rendering
of marked messages says where each piece stands, however the template trims, quotes or reorders it. Two marks without
a number stand where a template says that generated text begins and ends.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qlora_lite.data.chat.messages import REASONING_KEYS, Message

MARKS = 0xE000  # Unicode's private-use area
START, STOP, GENERATION, END_OF_GENERATION = (chr(MARKS + number) for number in range(4))
DIGITS, WIDTH = MARKS + 0x10, 5  # a number is so many hexadecimal digits
LAST = chr(DIGITS + 15)
MARK = re.compile(f"([{START}{STOP}])([{chr(DIGITS)}-{LAST}]{{{WIDTH}}})|[{GENERATION}{END_OF_GENERATION}]")
PRIVATE = re.compile(f"[{chr(MARKS)}-{LAST}]")
# Templates look for these in a message's content. They stay outside of the marks.
TAGS = re.compile(r"(</?(?:think|thought|reasoning|tool_response|tool_call)>)")


class Piece(NamedTuple):
    """Text of the author: the message's index, the field it stands in, and the text without surrounding space."""

    message: int
    field: str
    text: str


@dataclass(frozen=True)
class Rendering:
    """A conversation as text.

    spans: (start, stop) of the characters of each piece that the template wrote; the first place of one that it wrote
    several times. repeated: the pieces of that kind. generated: (start, stop) of what the template marks as generated.
    """

    text: str
    spans: Mapping[int, tuple[int, int]]
    repeated: frozenset[int] = frozenset()
    generated: tuple[tuple[int, int], ...] = ()

    @functools.cached_property
    def order(self) -> list[tuple[int, int]]:
        """The spans from left to right."""
        return sorted(self.spans.values())

    @functools.cached_property
    def whole(self) -> int:
        """How many pieces from the first one on are written without a gap."""
        return next(number for number in itertools.count() if number not in self.spans)

    def end_before(self, position: int) -> int:
        """Where the last piece ends that starts before a position; 0 if there is none."""
        place = bisect_left(self.order, (position, position))
        return self.order[place - 1][1] if place else 0

    def start_behind(self, position: int) -> int:
        """Where the first piece starts at a position or behind it; the end of the text if there is none."""
        place = bisect_left(self.order, (position, position))
        return self.order[place][0] if place < len(self.order) else len(self.text)


@functools.lru_cache(maxsize=4096)
def _digits(number: int) -> str:
    return "".join(chr(DIGITS + int(digit, 16)) for digit in f"{number:0{WIDTH}x}")


@functools.lru_cache(maxsize=4096)
def _number(digits: str) -> int:
    """The number of these digits, or -1 if they are other characters."""
    number = 0
    for digit in digits:
        value = ord(digit) - DIGITS
        if not 0 <= value < 16:
            return -1
        number = 16 * number + value
    return number


class MarkedMessages:
    """The messages of a conversation with marks around every piece of their text."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.pieces: list[Piece] = []
        self.numbers: dict[int, list[Piece]] = {}  # they bear no marks, by message
        self.messages = [self._message(index, message) for index, message in enumerate(messages)]

    def _text(self, message: int, name: str, text: str) -> str:
        if "<" not in text:
            return self._part(message, name, text)
        return "".join(self._part(message, name, part) for part in TAGS.split(text))

    def _part(self, message: int, name: str, part: str) -> str:
        core = part.strip()
        if not core or TAGS.fullmatch(part):
            return part
        number = _digits(len(self.pieces))
        self.pieces.append(Piece(message, name, core))
        marked = f"{START}{number}{core}{STOP}{number}"
        if len(core) == len(part):
            return marked
        first = part.index(core)
        return f"{part[:first]}{marked}{part[first + len(core) :]}"

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
        if len(message) == 2 and "content" in message:  # and a role
            return marked
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
    return _in_order(marked) or _in_any_order(marked)


def _in_order(marked: str) -> Rendering | None:
    """The same if each piece is written once and whole, one after another; else None. Most renderings are so."""
    if GENERATION in marked or END_OF_GENERATION in marked:
        return None
    first, *chunks = marked.split(START)
    parts, spans, length = [first], {}, len(first)
    for chunk in chunks:
        inner, _, frame = chunk.partition(STOP)
        number = inner[:WIDTH]
        if frame[:WIDTH] != number or len(number) < WIDTH or STOP in frame:
            return None
        stop = length + len(inner) - WIDTH
        spans[_number(number)] = (length, stop)
        parts += (inner[WIDTH:], frame[WIDTH:])
        length = stop + len(frame) - WIDTH
    return (
        Rendering("".join(parts), spans)
        if len(spans) == len(chunks) and -1 not in spans and STOP not in first
        else None
    )


def _in_any_order(marked: str) -> Rendering:
    parts: list[str] = []
    starts: dict[int, int] = {}
    repeated: set[int] = set()
    spans: dict[int, tuple[int, int]] = {}
    generated: list[tuple[int, int]] = []
    begun: list[int] = []
    done = length = 0
    for mark in MARK.finditer(marked):
        parts.append(marked[done : mark.start()])
        length += mark.start() - done
        done = mark.end()
        if mark[0] == GENERATION:
            begun.append(length)
        elif mark[0] == END_OF_GENERATION:
            start = begun.pop() if begun else length
            if not begun and start < length:  # the outermost of nested ones
                generated.append((start, length))
        elif (number := _number(mark[2])) in starts and mark[1] == START:
            repeated.add(number)
        elif mark[1] == START:
            starts[number] = length
        elif number in starts and number not in spans:
            spans[number] = (starts[number], length)
    text = "".join([*parts, marked[done:]])
    return Rendering(text, spans, frozenset(repeated), tuple(generated))


def marks_in(messages: Sequence[Message]) -> bool:
    """Whether messages hold characters that marks are made of."""
    return any(_holds_marks(value) for message in messages for value in ("".join(message), *message.values()))


def _holds_marks(value: object) -> bool:
    if isinstance(value, str):
        return not value.isascii() and PRIVATE.search(value) is not None
    if isinstance(value, Mapping):
        return any(_holds_marks(key) or _holds_marks(part) for key, part in value.items())
    return isinstance(value, list | tuple) and any(map(_holds_marks, value))
