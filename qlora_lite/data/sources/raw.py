"""A record as a file holds it, before its shape is checked."""

from __future__ import annotations

from typing import NamedTuple

from qlora_lite.checkpoints.files import excerpt

# 32 MiB of text are about ten million tokens.
LONGEST_LINE = 32 << 20
TOO_LONG = f"longer than {LONGEST_LINE:,} bytes; split the record"


class RawRecord(NamedTuple):
    """A record, or the reason why it could not be read.

    place: the file and the position in it, as "chats.jsonl, line 3". Positions count from 1.
    value: None if the record could not be read. From Arrow it may hold bytes, dates and decimals.
    error: None if the record could be read; else a sentence without the place.
    """

    place: str
    value: dict[str, object] | None
    error: str | None


def checked_object(place: str, value: object, advice: str) -> RawRecord:
    """Returns the record of a JSON value, or its error unless the value is an object.

    advice: what to do about that, for the error.
    """
    if isinstance(value, dict):
        return RawRecord(place, value, None)
    got = f"{type(value).__name__} {excerpt(value)}"
    return RawRecord(place, None, f"expected a JSON object, got {got}; {advice}")
