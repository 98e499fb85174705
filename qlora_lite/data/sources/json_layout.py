"""Tells JSON Lines from JSON that spans lines, by the first line and the beginning of the second.

Both begin with `{` or `[`. A first line that is complete, with another one behind it, is one of JSON Lines. If it is
not complete, it is either the beginning of a longer text or a damaged line: the next character decides, which
continues the text or cannot.
"""

from __future__ import annotations

import json
import re
from typing import BinaryIO

from qlora_lite.data.sources.json_lines import BYTE_ORDER_MARK
from qlora_lite.data.sources.raw import LONGEST_LINE

DECODER = json.JSONDecoder()
STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
STRINGS = re.compile(STRING)
BRACKETS = re.compile(r"[\[\]{}]")
# An object whose first value is a list of objects.
LIST_INSIDE = re.compile(rf"\s*\{{\s*({STRING})\s*:\s*\[\s*(?=\{{)")
# A list of this many bytes in one line is not decoded to see whether it is a damaged record of JSON Lines.
LARGE_LIST = 1 << 20
VALUE = '{["-0123456789tfnNI'
# The key of a conversation, and keys of its messages: an object that holds nothing else is a record.
CONVERSATION = "messages"
MESSAGE_KEYS = {"role", "from"}


def spans_lines(file: BinaryIO) -> bool:
    """Whether the content is one JSON text, as an array of records, rather than JSON Lines. Reads some of the file."""
    line = _next_line(file)
    first = line.decode("utf-8", "surrogateescape").strip()
    if not first.startswith(("{", "[")):
        return False
    if first.startswith("[") and len(line) > LARGE_LIST:
        return True
    if len(line) > LONGEST_LINE:
        return list_inside(first, 0) is not None
    following = _next_line(file).decode("utf-8", "surrogateescape").strip()
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return _continues(first, following)
    return not following and (isinstance(value, list) or inner_list(value) is not None)


def _next_line(file: BinaryIO) -> bytes:
    """The next line that is not blank, or as much of it as fits into LONGEST_LINE and a byte; empty at the end."""
    while line := file.readline(LONGEST_LINE + 1):
        if stripped := line.removeprefix(BYTE_ORDER_MARK).strip():
            return stripped if len(line) <= LONGEST_LINE else line
    return b""


def _continues(first: str, following: str) -> bool:
    """Whether an incomplete first line and the beginning of the following one can be parts of one JSON text."""
    if not following:
        return first.startswith("[") or list_inside(first, 0) is not None
    opened: list[str] = []
    for bracket in BRACKETS.findall(STRINGS.sub("", first)):
        if bracket in "[{":
            opened.append(bracket)
        elif opened:
            opened.pop()
    if not opened:
        return False
    key_or_value = '"' if opened[-1] == "{" else VALUE
    behind = {"{": '"}', "[": VALUE + "]", ":": VALUE, ",": key_or_value}.get(first[-1], ",:}]")
    return following[0] in behind


def inner_list(value: object) -> list[object] | None:
    """Returns the records of `{"data": [...]}`: an object whose only key holds a list of objects.

    None for another value, and for a conversation, which is a record itself.
    """
    if not isinstance(value, dict) or len(value) != 1:
        return None
    key, items = next(iter(value.items()))
    if key == CONVERSATION or not isinstance(items, list) or not items or not isinstance(items[0], dict):
        return None
    return None if MESSAGE_KEYS & set(items[0]) else items


def list_inside(text: str, start: int) -> int | None:
    """Returns the position of the first record if the text from `start` on begins as that of `{"data": [...]}`.

    None for any other text, and for the beginning of a conversation.
    """
    match = LIST_INSIDE.match(text, start)
    if match is None or match[1] == f'"{CONVERSATION}"':
        return None
    try:
        item, _ = DECODER.raw_decode(text, match.end())
    except (ValueError, RecursionError):
        return match.end()  # a damaged record, or one that ends behind this text
    return None if MESSAGE_KEYS & set(item) else match.end()
