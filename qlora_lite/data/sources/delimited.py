"""Records of CSV and TSV: the header names the keys, each row is a record, an empty cell is an absent key.

Rows are as RFC 4180 has them: a cell in quotes may hold delimiters, line ends and doubled quotes. All values are text.
Rows whose cells are all empty are passed over, as blank lines are.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO

from qlora_lite.checkpoints.files import excerpt
from qlora_lite.data.sources.json_lines import BYTE_ORDER_MARK, PIECE
from qlora_lite.data.sources.raw import LONGEST_LINE, TOO_LONG, RawRecord
from qlora_lite.errors import CheckpointError, listing

DELIMITERS = {".csv": ",", ".tsv": "\t"}
NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


class _RowTooLong(Exception):
    """A row has more bytes than LONGEST_LINE."""


class _Lines:
    """The lines of a file as text, for csv.reader. It counts them, and the bytes of the row that they belong to."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0
        self._size = 0
        self.bad: str | None = None  # the first byte of the row that is not UTF-8

    def start_row(self) -> None:
        self._size, self.bad = 0, None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(LONGEST_LINE + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self._size += len(line)
        if self._size > LONGEST_LINE:
            while line and not line.endswith(b"\n"):
                line = self._file.readline(PIECE)
            raise _RowTooLong
        if self.number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.bad = self.bad or f"byte 0x{line[error.start]:02x} in line {self.number}"
            return line.decode("utf-8", "surrogateescape")


def delimited(file: BinaryIO, name: str, delimiter: str) -> Iterator[RawRecord]:
    """Yields a record for each row behind the header. name: the file's, for the places of the records.

    Raises CheckpointError unless the header names each column once.
    """
    rows = _rows(file, name, delimiter)
    first = next(rows, None)
    if first is None:
        raise CheckpointError(f"{name} is empty; begin it with a header that names the columns")
    place, header, error = first
    if error is not None:
        raise CheckpointError(f"{place}: the header cannot be read: {error}")
    header = _checked_header(header, place, delimiter)
    for place, cells, error in rows:
        if error is None and not any(cells):
            continue
        if error is None and len(cells) != len(header):
            error = (
                f"has {len(cells)} cells for {len(header)} columns; put a cell in quotes if its text has {delimiter!r}"
            )
        if error is not None:
            yield RawRecord(place, None, error)
        else:
            yield RawRecord(place, {key: cell for key, cell in zip(header, cells, strict=True) if cell}, None)


def _checked_header(cells: list[str], place: str, delimiter: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    others = [NAMES[other] for other in NAMES if other in header[0] and other != delimiter]
    if len(header) == 1 and others:
        got = f"the header has one column, {excerpt(header[0])}"
        raise CheckpointError(f"{place}: {got}; separate the columns by {NAMES[delimiter]} instead of {others[0]}")
    if unnamed := [number for number, key in enumerate(header, 1) if not key]:
        which = f"{'columns' if len(unnamed) > 1 else 'column'} {listing(unnamed)}"
        raise CheckpointError(
            f"{place}: the header has no name for {which}; name it, or write the table without its index"
        )
    if twice := sorted({key for key in header if header.count(key) > 1}):
        raise CheckpointError(f"{place}: the header has several columns named {listing(twice)}; rename them")
    return header


def _rows(file: BinaryIO, name: str, delimiter: str) -> Iterator[tuple[str, list[str], str | None]]:
    """Yields (place, cells, error) of each row that is not blank; the place is the line where the row begins."""
    lines = _Lines(file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.start_row()
        place = f"{name}, line {lines.number + 1}"
        try:
            cells = _next_row(reader)
        except _RowTooLong:
            yield place, [], TOO_LONG
        except csv.Error as error:
            yield place, [], _sentence(error)
        else:
            if cells is None:
                return
            if lines.bad is not None:
                yield place, [], f"not UTF-8 ({lines.bad}); save the file as UTF-8"
            elif cells:
                yield place, cells, None


def _sentence(error: csv.Error) -> str:
    if "new-line character" in str(error):
        return "not valid CSV (a carriage return outside of quotes); end each line by a line feed"
    return f"not valid CSV ({error}); close quotes, and double those inside of a cell in quotes"


def _next_row(reader: Iterator[list[str]]) -> list[str] | None:
    """The next row, None at the end. The limit of a cell, which csv has for the whole process, is raised meanwhile."""
    limit = csv.field_size_limit(LONGEST_LINE)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)
