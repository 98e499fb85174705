"""Tests of telling JSON Lines from JSON that spans lines, with damaged first lines of both."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.data.sources import json_layout
from qlora_lite.data.sources.json_layout import inner_list, list_inside, spans_lines

VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=3)


def spans(content: bytes) -> bool:
    return spans_lines(io.BytesIO(content))


@settings(max_examples=50)
@given(st.lists(OBJECTS, min_size=2, max_size=4), st.sampled_from(["\n", "\r\n", "\n\n "]))
def test_an_object_on_each_line_is_json_lines(objects: list[Any], line_end: str) -> None:
    assert not spans(line_end.join(map(json.dumps, objects)).encode())


@settings(max_examples=50)
@given(OBJECTS.filter(bool) | st.lists(OBJECTS, min_size=1), st.sampled_from([0, 1, 4, "\t"]))
def test_indented_json_spans_lines(value: Any, indent: int | str) -> None:
    assert spans(json.dumps(value, indent=indent).encode())


@pytest.mark.parametrize(
    "content",
    [
        b'[{"a": 1}, {"a": 2}]',
        b'\xef\xbb\xbf\n [{"a": 1}]\n\n',
        b'[{"a": 1},\n{"a": 2}]',
        b'[{"a": 1}\n,{"a": 2}]',
        b"[\n]",
        b'[{"a": 1}, {"a": ',
        b'{"data": [{"a": 1}]}',
        b'{"data": [{"a": 1}, {"a": ',
        b'{"data": [\n{"a": 1},\n{"a": 2}\n]}',
        b'{"version": 1, "data":\n[{"a": 1}]}',
        b'{"a": "[{", "b":\n"c"}',
    ],
)
def test_one_text(content: bytes) -> None:
    assert spans(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n \n",
        b'{"a": 1}',
        b'{"messages": [{"content": "a"}]}',
        b'{"conversations": [{"from": "human", "value": "a"}]}',
        b'{"a": 1\n{"a": 2}\n',
        b'{"a": 1,\n{"a": 2}\n',
        b'{"a": "b\n{"a": 2}\n',
        b'{broken\nand more\n{"a": 2}\n',
        b'["a"\n{"a": 2}\n',
        b'["a"]\n{"a": 2}\n',
        b"{'a': 1}\n{'a': 2}\n",
        b'{"a": 1}}\n{"a": 2}\n',
        b'{"data": [{"a": 1}]}\n{"data": [{"a": 2}]}\n',
        b'text\n{"a": 1}\n',
        b"\xff\xff\n",
    ],
)
def test_lines(content: bytes) -> None:
    assert not spans(content)


def test_a_long_first_line_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_layout, "LONGEST_LINE", 50)
    monkeypatch.setattr(json_layout, "LARGE_LIST", 50)
    monkeypatch.setattr(json_layout.json, "loads", None)
    item = b'{"a": "' + b"x" * 60 + b'"}, '
    assert spans(b"[" + item * 3)
    assert spans(b'{"data": [' + item * 3)
    assert not spans(item)
    assert not spans(b'{"messages": [' + item * 3)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ('{"data": [{"a": 1}', 10),
        ('{"da\\"ta":[ {"a": ', 12),
        ('{"data": {"a": 1}}', None),
        ('{"data": ["a"]}', None),
        ('{"a": 1, "data": [{"a": 1}]}', None),
        ('{"messages": [{"a": 1}]}', None),
        ('{"chat": [{"role": "user"}]}', None),
        ("", None),
    ],
)
def test_list_inside(text: str, start: int | None) -> None:
    assert list_inside(text, 0) == start
    assert list_inside("  " + text, 2) == (None if start is None else start + 2)


@pytest.mark.parametrize("value", [[], {}, {"a": []}, {"a": [1]}, {"a": [{}], "b": 1}, {"a": [{"from": "gpt"}]}, 3])
def test_other_values_hold_no_list_of_records(value: object) -> None:
    assert inner_list(value) is None


def test_inner_list() -> None:
    assert inner_list({"rows": [{"a": 1}, {"b": 2}]}) == [{"a": 1}, {"b": 2}]
