"""Tests of the window that moves over a JSON file, and of the end of values that are not valid."""

from __future__ import annotations

import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.data.sources import json_text
from qlora_lite.data.sources.json_text import JsonText, ValueEnd
from qlora_lite.data.sources.raw import RawRecord
from qlora_lite.errors import CheckpointError

VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(VALUES, st.integers(1, 9), st.sampled_from([",", "]", " ,", "\n"]))
def test_the_end_of_a_value_is_found_in_pieces(value: Any, size: int, behind: str) -> None:
    text = json.dumps(value, ensure_ascii=False)
    end, at = ValueEnd(), 0
    pieces = [(text + behind)[start : start + size] for start in range(0, len(text + behind), size)]
    for piece in pieces:
        found = end.find(piece, 0)
        if found is not None:
            at += found
            break
        at += len(piece)
    assert at == len(text)


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("{'a': 1}, 2", 8),
        ('{"a": "}\\"]"}x', 13),
        ("nul, 2", 3),
        ("undefined]", 9),
        (", 2", 0),
        ('{"a": [1}]', 10),
        ('{"a": "b', None),
        ('"a\\', None),
    ],
)
def test_the_end_of_what_is_not_json(text: str, end: int | None) -> None:
    assert ValueEnd().find(text, 0) == end


def first_record(content: bytes) -> tuple[RawRecord, JsonText]:
    text = JsonText(io.BytesIO(content), "a.json")
    text.next_character()
    return text.record("a.json, record 1"), text


@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_characters_of_several_bytes_and_numbers_are_not_cut(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(json_text, "CHUNK", chunk)
    record, text = first_record('\ufeff {"é": "😀", "n": 12345} 7'.encode())
    assert record == RawRecord("a.json, record 1", {"é": "😀", "n": 12345}, None)
    assert text.next_character() == "7"
    wrong = first_record(b"12345 ")[0]
    assert wrong.error is not None
    assert "got int 12345;" in wrong.error


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'\n{"a": "caf\xe9"}', "not UTF-8 (byte 0xe9 in line 2); save the file as UTF-8"),
        (
            b'{"a": 1,\n}',
            "not valid JSON (Expecting property name enclosed in double quotes in line 2, before '}'), got",
        ),
        (b'{"a": "\n"}', "not valid JSON (Invalid control character in line 1, before"),
        (b"[" * 100_000 + b"]" * 100_000, "not valid JSON (maximum recursion depth exceeded"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON (Exceeds the limit"),
    ],
)
def test_a_wrong_value_is_passed(monkeypatch: pytest.MonkeyPatch, content: bytes, error: str, chunk: int) -> None:
    monkeypatch.setattr(json_text, "CHUNK", chunk)
    record, text = first_record(content + b"\n,")
    assert record.value is None
    assert str(record.error).startswith(error)
    assert "\n" not in str(record.error)
    assert text.next_character() == ","


@pytest.mark.parametrize("content", [b'{"a": ', b'{"a": "b}', b'{"a": tru', b'{"a": [{"b": 1}'])
def test_a_file_that_ends_within_a_value(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"a\.json, record 1 is not complete: line 1 has .*; the file is damaged"):
        first_record(content)


class LongValue(io.RawIOBase):
    """A value of 25 MB in an array, made while it is read."""

    def __init__(self, end: bytes) -> None:
        self.parts = iter([b'{"a": "', *[b'x\\"{' * 250_000] * 25, end])
        self.left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self.left = self.left or next(self.parts, b"")
        part, self.left = self.left[: len(buffer)], self.left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def test_a_value_of_any_size_is_passed_over_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(json_text, "CHUNK", 1 << 18)
    text = JsonText(io.BufferedReader(LongValue(b'"}, 7 ')), "a.json")
    text.next_character()
    tracemalloc.start()
    record = text.record("a.json, record 1")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert record == RawRecord("a.json, record 1", None, "longer than 33,554,432 bytes; split the record")
    assert text.next_character() == ","
    assert peak < 12 << 20
