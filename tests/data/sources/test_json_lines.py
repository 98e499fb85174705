"""Tests of JSON Lines: every line is a record or an error with its number, and reading goes on behind it."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Iterator

import pytest

from qlora_lite.data.sources import json_lines as module
from qlora_lite.data.sources.json_lines import json_lines
from qlora_lite.data.sources.raw import LONGEST_LINE, RawRecord


def read(content: bytes) -> list[RawRecord]:
    return list(json_lines(io.BytesIO(content), "a.jsonl"))


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n   \n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_reads_every_line_and_passes_over_blank_ones(line_end: str, mark: bytes) -> None:
    values = [{"text": "héllo\u2028"}, {"n": 1.5, "deep": [{"a": None}]}, {}]
    found = read(mark + line_end.join(json.dumps(value, ensure_ascii=False) for value in values).encode())
    assert [record.value for record in found] == values
    step = line_end.count("\n")
    assert [record.place for record in found] == [f"a.jsonl, line {1 + step * index}" for index in range(3)]
    assert {record.error for record in found} == {None}


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"\xff\xfe{", "not UTF-8 (byte 0xff at column 1); save the file as UTF-8"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at column 14); save the file as UTF-8"),
        # UTF-8 of a lone surrogate, which json.loads would accept from bytes.
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8 (byte 0xed at column 11); save the file as UTF-8"),
        (
            b'{"text": "a"',
            "not valid JSON (Expecting ',' delimiter at column 13), got '{\"text\": \"a\"'; write one",
        ),
        (b'{"a": 1}\r', None),
        (b'["a"]', "expected a JSON object, got list ['a']; write one JSON object per line"),
        (b"[" * 100_000, "not valid JSON (maximum recursion depth"),
        (b"9" * 5000, "not valid JSON (Exceeds the limit"),
        (b'{"text": "\\ud800"}', None),
    ],
)
def test_a_wrong_line_does_not_stop_the_reading(line: bytes, error: str | None) -> None:
    first, wrong, last = read(b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    assert first == RawRecord("a.jsonl, line 1", {"n": 1}, None)
    assert last == RawRecord("a.jsonl, line 3", {"n": 3}, None)
    assert wrong.place == "a.jsonl, line 2"
    assert (wrong.value is None) == (error is not None)
    assert wrong.error is None if error is None else str(wrong.error).startswith(error)


class LongLine(io.RawIOBase):
    """A file of one line of 1 GB between two short ones, made while it is read."""

    def __init__(self) -> None:
        self.parts = self.made()

    def made(self) -> Iterator[bytes]:
        yield b'{"n": 1}\n'
        for _ in range(1000):
            yield b"x" * 1_000_000
        yield b'\n{"n": 3}\n'

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        part = next(self.parts, b"")
        buffer[: len(part)] = part
        return len(part)


def test_a_line_of_a_gigabyte_is_passed_over_in_little_memory() -> None:
    file = io.BufferedReader(LongLine(), 1 << 20)
    tracemalloc.start()
    found = list(json_lines(file, "a.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [record.value for record in found] == [{"n": 1}, None, {"n": 3}]
    assert found[1].error == "longer than 33,554,432 bytes; split the record"
    assert found[2].place == "a.jsonl, line 3"
    assert peak < 4 * LONGEST_LINE


@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"n": 3}'])
@pytest.mark.parametrize(("size", "fits"), [(20, True), (21, False), (45, False)])
def test_the_limit_counts_a_line_without_its_end(
    monkeypatch: pytest.MonkeyPatch, size: int, fits: bool, end: bytes
) -> None:
    monkeypatch.setattr(module, "LONGEST_LINE", 20)
    monkeypatch.setattr(module, "PIECE", 7)
    found = read(b'{"n": 1}\n' + b'{"n": 2}'.ljust(size) + end)
    assert [record.error is None for record in found] == [True, fits] + [True] * end.count(b"n")
    assert [record.place[-1] for record in found] == list("123")[: len(found)]
