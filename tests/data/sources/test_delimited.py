"""Tests of CSV and TSV: what csv writes comes back, and a wrong row is an error with the line where it begins."""

from __future__ import annotations

import csv
import io
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.data.sources import delimited as module
from qlora_lite.data.sources.delimited import delimited
from qlora_lite.data.sources.raw import RawRecord
from qlora_lite.errors import CheckpointError

# csv refuses NUL before Python 3.11.
TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=6)
KEYS = st.lists(TEXT.map(str.strip).filter(bool), min_size=2, max_size=4, unique=True)


def read(content: str | bytes, delimiter: str = ",") -> list[RawRecord]:
    file = io.BytesIO(content.encode() if isinstance(content, str) else content)
    return list(delimited(file, "a.csv", delimiter))


@settings(max_examples=100)
@given(KEYS, st.lists(st.lists(TEXT, min_size=4, max_size=4), max_size=5), st.sampled_from(["\n", "\r\n"]), st.data())
def test_what_csv_writes_comes_back(keys: list[str], rows: list[list[str]], line_end: str, data: st.DataObject) -> None:
    delimiter = data.draw(st.sampled_from(",\t"))
    cells = [row[: len(keys)] for row in rows]
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL).writerows([keys, *cells])
    found = read(data.draw(st.sampled_from(["", "\ufeff"])) + file.getvalue(), delimiter)
    wanted = [{key: cell for key, cell in zip(keys, row, strict=True) if cell} for row in cells if any(row)]
    assert [record.value for record in found] == wanted
    assert {record.error for record in found} <= {None}


def test_places_are_the_lines_where_rows_begin() -> None:
    found = read('a,b\n1,2\n\n"x\ny\n","say ""hi"", twice"\n,3\n,\n4,\n')
    assert found == [
        RawRecord("a.csv, line 2", {"a": "1", "b": "2"}, None),
        RawRecord("a.csv, line 4", {"a": "x\ny\n", "b": 'say "hi", twice'}, None),
        RawRecord("a.csv, line 7", {"b": "3"}, None),
        RawRecord("a.csv, line 9", {"a": "4"}, None),
    ]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (b"1,2,3", "has 3 cells for 2 columns; put a cell in quotes if its text has ','"),
        (b"1", "has 1 cells for 2 columns"),
        (b'"1"x,2', "not valid CSV (',' expected after '\"'); close quotes, and double those inside"),
        (b"caf\xe9,2", "not UTF-8 (byte 0xe9 in line 3); save the file as UTF-8"),
        (b"1\r,2", "not valid CSV (a carriage return outside of quotes); end each line by a line feed"),
    ],
)
def test_a_wrong_row_does_not_stop_the_reading(row: bytes, error: str) -> None:
    first, wrong, last = read(b"a,b\n1,2\n" + row + b"\n5,6\n")
    assert (first.place, last.place) == ("a.csv, line 2", "a.csv, line 4")
    assert last.value == {"a": "5", "b": "6"}
    assert (wrong.place, wrong.value) == ("a.csv, line 3", None)
    assert str(wrong.error).startswith(error)


def test_a_quote_that_is_not_closed() -> None:
    found = read('a,b\n1,2\n3,"4\n5,6\n')
    assert [record.place for record in found] == ["a.csv, line 2", "a.csv, line 3"]
    assert str(found[1].error).startswith("not valid CSV (unexpected end of data); close quotes")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "a.csv is empty; begin it with a header that names the columns"),
        ("\n\n", "a.csv is empty"),
        ("a,,b,\n1,2,3,4\n", "a.csv, line 1: the header has no name for columns 2, 4; name it"),
        ("\na, \n1,2\n", "a.csv, line 2: the header has no name for column 2"),
        ("a,b,a,b\n1,2,3,4\n", "a.csv, line 1: the header has several columns named a, b; rename them"),
        (
            "a;b\n1;2\n",
            "a.csv, line 1: the header has one column, 'a;b'; separate the columns by commas instead of semi",
        ),
        ('"a\n', "a.csv, line 1: the header cannot be read: not valid CSV (unexpected end of data)"),
        (b"\xe9,b\n", "a.csv, line 1: the header cannot be read: not UTF-8 (byte 0xe9 in line 1)"),
    ],
)
def test_a_file_without_a_clear_header_is_refused(content: str | bytes, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(content)
    assert str(caught.value).startswith(says)


def test_tabs_in_place_of_commas() -> None:
    assert read("a\tb\n1\t2,3\n", "\t")[0].value == {"a": "1", "b": "2,3"}
    with pytest.raises(CheckpointError, match="separate the columns by tabs instead of commas"):
        read("a,b\n1,2\n", "\t")


def test_a_cell_may_be_larger_than_the_limit_of_csv_which_stays_as_it_was() -> None:
    before = csv.field_size_limit()
    large = "x" * (before + 1)
    for record in delimited(io.BytesIO(f"a,b\n{large},1\n".encode()), "a.csv", ","):
        assert csv.field_size_limit() == before
        assert record.value == {"a": large, "b": "1"}
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(("cell", "behind"), [("x" * 5_000_000, 4), ('"' + "x,\n" * 1000, 3)])
def test_a_row_above_the_limit_is_passed_over_in_little_memory(
    monkeypatch: pytest.MonkeyPatch, cell: str, behind: Any
) -> None:
    """A quote that is not closed swallows lines up to the limit, and not the file."""
    monkeypatch.setattr(module, "LONGEST_LINE", 1000)
    monkeypatch.setattr(module, "PIECE", 1000)
    content = io.BytesIO(f'a,b\n1,2\n{cell},3\n4,5"\n6,7\n'.encode())
    tracemalloc.start()
    records = delimited(content, "a.csv", ",")
    first, long = next(records), next(records)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first.value == {"a": "1", "b": "2"}
    assert long == RawRecord("a.csv, line 3", None, "longer than 33,554,432 bytes; split the record")
    assert list(records)[-1].value == {"a": "6", "b": "7"}
    assert peak < 500_000
