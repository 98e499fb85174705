"""The text of a JSON file that is too large to be held: a window that moves over it.

Values are decoded where they stand. Bytes that are not UTF-8 become lone surrogates, which UTF-8 never gives, so that
they spoil one record and not the file.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import BinaryIO

from qlora_lite.checkpoints.files import SHOWN, excerpt
from qlora_lite.data.sources.json_layout import DECODER
from qlora_lite.data.sources.raw import LONGEST_LINE, TOO_LONG, RawRecord, checked_object
from qlora_lite.errors import CheckpointError

CHUNK = 1 << 20
NOT_SPACE = re.compile(r"[^ \t\r\n]")
NOT_UTF8 = re.compile("[\udc80-\udcff]")
OUTSIDE = re.compile(r'["\[\]{}]')
BEFORE_VALUE = re.compile(r'["\[\]{},\s]')
# Not all of the escapes at once: each takes memory while it is matched.
IN_STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*){0,1000}', re.DOTALL)
ADVICE = "write one JSON object for each record"


class ValueEnd:
    """Finds the end of one JSON value by its brackets and quotes, whether or not it is valid, in pieces of text."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def find(self, text: str, at: int) -> int | None:
        """Returns the position behind the value, None if it goes on in the next piece."""
        if self._escaped and at < len(text):
            self._escaped, at = False, at + 1
        while True:
            if self._quoted:
                at = IN_STRING.match(text, at).end()  # type: ignore[union-attr]
                if at == len(text) or text[at] == "\\":
                    if at + 1 < len(text):
                        continue
                    self._escaped = at < len(text)
                    return None
                self._quoted, at = False, at + 1
            else:
                found = (OUTSIDE if self._depth else BEFORE_VALUE).search(text, at)
                if found is None:
                    return None
                if self._depth == 0 and found[0] not in '"[{':  # a number or a word ends before this
                    return found.start()
                at = found.end()
                self._quoted = found[0] == '"'
                self._depth += (found[0] in "[{") - (found[0] in "]}")
            if self._depth == 0 and not self._quoted:
                return at


class JsonText:
    """The decoded text of a file from `at` on. `text` grows at its end and is cut at its beginning."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name, self.text, self.at = name, "", 0
        self.ended = False
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._line = 1  # of the text's first character
        self._damaged = False

    def grow(self) -> None:
        """Reads on: at least as much as is held already, so that a long value is decoded a few times only."""
        held = len(self.text) - self.at
        piece = self._file.read(max(CHUNK, min(held, LONGEST_LINE - held)))
        self.ended = not piece
        decoded = self._decoder.decode(piece, final=self.ended)
        if self._line == 1 and not self.text:
            decoded = decoded.removeprefix("\ufeff")
        self._damaged = self._damaged or (not decoded.isascii() and NOT_UTF8.search(decoded) is not None)
        self._line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + decoded, 0

    def next_character(self) -> str:
        """Returns the next character that is not white space, and moves to it; empty at the end of the file."""
        while True:
            if found := NOT_SPACE.search(self.text, self.at):
                self.at = found.start()
                return found[0]
            self.at = len(self.text)
            if self.ended:
                return ""
            self.grow()

    def record(self, place: str) -> RawRecord:
        """Reads the value at this position and moves behind it.

        Raises CheckpointError if the file ends within the value.
        """
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                # A number may go on behind this text.
                if end < len(self.text) or self.ended or not isinstance(value, (int, float)):
                    return self._decoded(value, end, place)
            except (ValueError, RecursionError) as error:
                behind = ValueEnd().find(self.text, self.at)
                if behind is not None and (behind < len(self.text) or self.ended):
                    return self._wrong(error, behind, place)
            if self.ended:
                raise self.error(f"{place} is not complete", "the file is damaged or incomplete: copy it again")
            if len(self.text) - self.at > LONGEST_LINE:
                return self._passed_over(place)
            self.grow()

    def _decoded(self, value: object, end: int, place: str) -> RawRecord:
        start, self.at = self.at, end
        if end - start > LONGEST_LINE:
            return RawRecord(place, None, TOO_LONG)
        bad = NOT_UTF8.search(self.text, start, end) if self._damaged else None
        if bad is not None:
            where = f"byte 0x{ord(bad[0]) - 0xDC00:02x} in line {self._line_at(bad.start())}"
            return RawRecord(place, None, f"not UTF-8 ({where}); save the file as UTF-8")
        return checked_object(place, value, ADVICE)

    def _wrong(self, error: Exception, end: int, place: str) -> RawRecord:
        """The error of a value that is not JSON, though its brackets and quotes say where it ends."""
        if end == self.at:
            raise self.error(f"{place} is empty", "remove the comma, or write a record")
        start, self.at = self.at, end
        shown = excerpt(self.text[start:end])
        why = str(error)
        if isinstance(error, json.JSONDecodeError):
            before = excerpt(self.text[error.pos : end])
            why = f"{error.msg.removesuffix(' at')} in line {self._line_at(error.pos)}, before {before}"
        return RawRecord(place, None, f"not valid JSON ({why}), got {shown}; {ADVICE}")

    def _passed_over(self, place: str) -> RawRecord:
        """Moves behind a value of any length, holding a piece of it at a time."""
        value_end, line = ValueEnd(), self._line_at(self.at)
        while (end := value_end.find(self.text, self.at)) is None:
            self.at = len(self.text)
            if self.ended:
                begins = f"{place} begins in line {line} and does not end"
                raise CheckpointError(f"{begins} in {LONGEST_LINE:,} bytes or more; check its brackets and quotes")
            self.grow()
        self.at = end
        return RawRecord(place, None, TOO_LONG)

    def _line_at(self, position: int) -> int:
        return self._line + self.text.count("\n", 0, position)

    def error(self, wrong: str, advice: str) -> CheckpointError:
        """Returns the error of a file that cannot be read on from this position."""
        while not self.ended and len(self.text) - self.at < SHOWN:
            self.grow()
        got = excerpt(self.text[self.at : self.at + SHOWN]) if self.at < len(self.text) else "the end of the file"
        return CheckpointError(f"{wrong}: line {self._line_at(self.at)} has {got}; {advice}")
