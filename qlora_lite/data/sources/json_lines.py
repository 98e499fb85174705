"""Records of JSON Lines: one object per line, in UTF-8. Blank lines are passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from qlora_lite.checkpoints.files import excerpt
from qlora_lite.data.sources.raw import LONGEST_LINE, TOO_LONG, RawRecord, checked_object

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PIECE = 1 << 20
ADVICE = "write one JSON object per line"


def lines_of(file: BinaryIO) -> Iterator[bytes | None]:
    """Yields the lines without their ends and without a byte order mark; None for a line above LONGEST_LINE.

    Such a line is passed over a piece at a time.
    """
    line = file.readline(LONGEST_LINE + 1).removeprefix(BYTE_ORDER_MARK)
    while line:
        if len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(PIECE)
            yield None
        else:
            yield line.rstrip(b"\r\n")
        line = file.readline(LONGEST_LINE + 1)


def json_lines(file: BinaryIO, name: str) -> Iterator[RawRecord]:
    """Yields the record of each line that is not blank. name: the file's, for the places of the records."""
    for number, line in enumerate(lines_of(file), 1):
        if line is None:
            yield RawRecord(f"{name}, line {number}", None, TOO_LONG)
        elif line.strip():
            yield _parsed(line, f"{name}, line {number}")


def _parsed(line: bytes, place: str) -> RawRecord:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        return RawRecord(place, None, f"not UTF-8 ({bad}); save the file as UTF-8")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        # str(error) of a JSONDecodeError would count lines from this one.
        why = str(error)
        if isinstance(error, json.JSONDecodeError):
            why = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        return RawRecord(place, None, f"not valid JSON ({why}), got {excerpt(text)}; {ADVICE}")
    return RawRecord(place, value, None) if isinstance(value, dict) else checked_object(place, value, ADVICE)
