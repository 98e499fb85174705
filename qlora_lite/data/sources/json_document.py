"""Records of a JSON file that is not JSON Lines.

    [{...}, {...}]              an array of records
    {"data": [{...}, {...}]}    an object whose only key holds one
    {...} {...}                 records one after the other, each of one or more lines

The file is read a piece at a time, and a record at a time is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from qlora_lite.data.sources.json_layout import DECODER, inner_list, list_inside
from qlora_lite.data.sources.json_text import JsonText
from qlora_lite.data.sources.raw import RawRecord

# An object of this size is decoded as a whole to see whether it is a record or holds a list of them.
SMALL_OBJECT = 1 << 20
AS_LINES = "write the records as JSON Lines, one object per line"


def json_document(file: BinaryIO, name: str) -> Iterator[RawRecord]:
    """Yields the records of a JSON file.

    A record that is not valid JSON is yielded with its error if its brackets and quotes say where it ends. Raises
    CheckpointError where the file cannot be read on. name: the file's, for the places of the records.
    """
    text = JsonText(file, name)
    first = text.next_character()
    if first == "[":
        text.at += 1
        yield from _listed(text)
    elif first == "{" and (start := _start_of_list(text)) is not None:
        text.at = start
        yield from _listed(text)
        if text.next_character() != "}":
            raise text.error(f"{name} has more beside the list of records", AS_LINES)
        text.at += 1
    else:
        yield from _in_sequence(text)
    if text.next_character():
        raise text.error(f"{name} has more behind its records", "write all of them into one list, or as JSON Lines")


def _start_of_list(text: JsonText) -> int | None:
    """The position of the first record if the text is `{"data": [...]}`, None if it is a record."""
    while not text.ended and len(text.text) - text.at < SMALL_OBJECT:
        text.grow()
    start = list_inside(text.text, text.at)
    if start is None:
        return None
    try:
        value, end = DECODER.raw_decode(text.text, text.at)
    except (ValueError, RecursionError):
        return start
    before, size = start - text.at, end - text.at
    while not text.ended and not text.text[text.at + size :].strip():
        text.grow()
    # More objects behind this one are records of its kind.
    alone = not text.text[text.at + size :].strip()
    return text.at + before if alone and inner_list(value) is not None else None


def _listed(text: JsonText) -> Iterator[RawRecord]:
    """Yields the items of a list whose bracket was passed, and passes the other one."""
    count = 0
    separator = text.next_character()
    while separator != "]":
        if separator == "":
            raise text.error(f"{text.name} ends within its list of records", "it is incomplete: copy it again")
        count += 1
        yield text.record(f"{text.name}, record {count}")
        separator = text.next_character()
        if separator == ",":
            text.at += 1
            separator = text.next_character()
            if separator == "]":
                raise text.error(f"{text.name} has a comma behind its last record", "remove the comma")
        elif separator not in ("]", ""):
            raise text.error(f"{text.name} lacks a comma behind record {count}", "write one, or use JSON Lines")
    text.at += 1


def _in_sequence(text: JsonText) -> Iterator[RawRecord]:
    count = 0
    while text.next_character() in ("{", "["):
        count += 1
        yield text.record(f"{text.name}, record {count}")
