"""Tests of JSON files that are not JSON Lines: any layout, read in pieces of any size, gives the records."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.data.sources import json_document as module
from qlora_lite.data.sources import json_text
from qlora_lite.data.sources.json_document import json_document
from qlora_lite.data.sources.raw import LONGEST_LINE, RawRecord
from qlora_lite.errors import CheckpointError

VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.text(max_size=4).filter(lambda key: key not in ("role", "from")), VALUES, max_size=3)

Dump = Callable[[Any], str]
DUMPS = st.builds(
    lambda indent, ascii_only: lambda value: json.dumps(value, indent=indent, ensure_ascii=ascii_only),
    st.sampled_from([None, 0, 2, "\t"]),
    st.booleans(),
)
# Records with two keys: an object with one list of objects alone in a file is a list of records.
RECORDS = st.lists(OBJECTS.map(lambda value: {"id": 0, "more": 1, **value}), min_size=1, max_size=5)


def read(content: str | bytes, chunk: int = 1 << 20, small: int = 1 << 20) -> list[RawRecord]:
    file = io.BytesIO(content.encode() if isinstance(content, str) else content)
    with patch.object(json_text, "CHUNK", chunk), patch.object(module, "SMALL_OBJECT", small):
        return list(json_document(file, "a.json"))


def values(found: list[RawRecord]) -> list[object]:
    assert [record.place for record in found] == [f"a.json, record {number + 1}" for number in range(len(found))]
    assert {record.error for record in found} <= {None}
    return [record.value for record in found]


@settings(max_examples=50)
@given(st.lists(OBJECTS, max_size=5), DUMPS, st.integers(1, 40), st.sampled_from(["", "\ufeff", "\n "]))
def test_an_array(objects: list[Any], dump: Dump, chunk: int, before: str) -> None:
    assert values(read(before + dump(objects) + "\n", chunk)) == objects


@settings(max_examples=50)
@given(
    RECORDS, DUMPS, st.integers(1, 40), st.integers(100, 300), st.text(max_size=4).filter(lambda key: key != "messages")
)
def test_an_object_that_holds_an_array(objects: list[Any], dump: Dump, chunk: int, small: int, key: str) -> None:
    assert values(read(dump({key: objects}), chunk, small)) == objects


@settings(max_examples=50)
@given(RECORDS, DUMPS, st.integers(1, 40), st.sampled_from(["", "\n", "\n\n"]))
def test_objects_one_after_the_other(objects: list[Any], dump: Dump, chunk: int, between: str) -> None:
    assert values(read(between.join(map(dump, objects)), chunk)) == objects


@settings(max_examples=50)
@given(RECORDS, DUMPS, st.integers(1, 40), st.data())
def test_a_part_of_an_array_is_an_error_behind_its_records(
    objects: list[Any], dump: Dump, chunk: int, data: st.DataObject
) -> None:
    text = dump(objects)
    cut = text[: data.draw(st.integers(1, len(text) - 1))].encode()
    found = []
    with (
        pytest.raises(CheckpointError, match=r"^a\.json"),
        patch.object(json_text, "CHUNK", chunk),
    ):
        found += [record.value for record in iter(json_document(io.BytesIO(cut), "a.json"))]
    for record in found:
        assert record in objects


@pytest.mark.parametrize(
    "content",
    [
        '{"messages": [{"content": "a"}]}',
        '{"conversations": [{"from": "human", "value": "a"}]}',
        '{"chat": [{"role": "user", "content": "a"}]}',
        '{\n"tools": [{"type": "function"}],\n"messages": [{"role": "user", "content": "a"}]\n}',
        '{"data": []}',
        '{"prompt": "a",\n"completion": "b"}',
    ],
)
def test_one_object_is_one_record(content: str) -> None:
    assert values(read(content)) == [json.loads(content)]


def test_several_objects_that_hold_lists_are_records() -> None:
    assert len(read('{"a": [{"b": 1}, {"b": 2}]}\n{"a": [{"b": 3}]}')) == 2
    assert values(read('{"a": [{"b": 1}, {"b": 2}]}', chunk=3, small=27)) == [{"b": 1}, {"b": 2}]


def test_a_wrong_record_does_not_stop_the_reading() -> None:
    found = read(b'[{"n": 1},\n{"n": 2,},\n{\'n\': 3}, nul, 5,\n{"n": "\xff"}, {"n": 7}]')
    assert [record.value for record in found] == [{"n": 1}, None, None, None, None, None, {"n": 7}]
    errors = [record.error or "" for record in found[1:-1]]
    assert errors[0].startswith(
        "not valid JSON (Expecting property name enclosed in double quotes in line 2, before '}')"
    )
    assert errors[1].endswith("got \"{'n': 3}\"; write one JSON object for each record")
    assert errors[2].startswith("not valid JSON (Expecting value in line 3, before 'nul')")
    assert errors[3] == "expected a JSON object, got int 5; write one JSON object for each record"
    assert errors[4] == "not UTF-8 (byte 0xff in line 4); save the file as UTF-8"


@pytest.mark.parametrize("layout", ["[RECORDS]", '{"data": [RECORDS]}', "RECORDS"])
def test_a_record_above_the_limit_is_passed_over(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    monkeypatch.setattr(json_text, "LONGEST_LINE", 100)
    comma = "" if layout == "RECORDS" else ","
    for size, fits in [(100, True), (101, False), (300, False)]:
        record = '{"n": 2, "text": "' + "{" * (size - 20) + '"}'
        assert len(record) == size
        content = layout.replace("RECORDS", f'{{"n": 1}}{comma} {record}{comma} {{"n": 3}}')
        for chunk in (1, 16, 1000):
            found = read(content, chunk, small=30)
            assert [record.error is None for record in found] == [True, fits, True]
            assert found[1].error in (None, f"longer than {LONGEST_LINE:,} bytes; split the record")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"a": 1},\n]', "a.json has a comma behind its last record: line 2 has ']'; remove the comma"),
        ('[{"a": 1}\n{"a": 2}]', "a.json lacks a comma behind record 1: line 2 has '{\"a\": 2}]'; write one, or use"),
        ('[{"a": 1},,{"a": 2}]', "a.json, record 2 is empty: line 1 has ',{\"a\": 2}]'; remove the comma, or write"),
        ('[{"a": 1}]\n[]', "a.json has more behind its records: line 2 has '[]'; write all of them into one list"),
        ('[{"a": 1}', "a.json ends within its list of records: line 1 has the end of the file; it is incomplete"),
        ('{"a": 1}\n}', "a.json has more behind its records: line 2 has '}'"),
    ],
)
def test_a_file_that_cannot_be_read_on(content: str, says: str) -> None:
    for chunk in (1, 5, 1000):
        with pytest.raises(CheckpointError) as caught:
            read(content, chunk)
        assert str(caught.value).startswith(says)


def test_a_large_object_with_more_than_a_list_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match="has more beside the list of records: line 1 has ', \"v\": 1}'; write the"
    ):
        read('{"data": [{"a": 1}, {"a": 2}], "v": 1}', chunk=8, small=20)
    assert values(read('{"data": [{"a": 1}, {"a": 2}], "v": 1}')) == [{"data": [{"a": 1}, {"a": 2}], "v": 1}]


def test_quotes_that_do_not_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "LONGEST_LINE", 100)
    with pytest.raises(CheckpointError) as caught:
        read('[{"a": 1},\n{"a: 2}, ' + '{"a": 3},\n' * 50 + "]", chunk=16)
    assert str(caught.value).startswith("a.json, record 2 ")
