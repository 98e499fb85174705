"""Tests of records: mixed shapes, renamed keys, nulls, and all bad records listed with file and line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.data.records import (
    BadRecords,
    Found,
    check_fields,
    check_record,
    checked_records,
    in_ranges,
    read_records,
)
from qlora_lite.data.sources.raw import RawRecord
from qlora_lite.errors import CheckpointError, ConfigError

FOUR_SHAPES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": "wörld"}]},
    {"prompt": "a", "completion": "b", "source": 7},
    {"instruction": "a", "input": "", "output": "b", "text": "the whole again"},
    {"instruction": "a", "output": "b"},
    {"text": "a\nb"},
]


def written(folder: Path, content: bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n   \n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_reads_mixed_shapes_and_skips_blank_lines(tmp_path: Path, line_end: str, mark: bytes) -> None:
    lines = line_end.join(json.dumps(record, ensure_ascii=False) for record in FOUR_SHAPES)
    assert read_records(written(tmp_path, mark + lines.encode("utf-8"))) == FOUR_SHAPES


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"\xff\xfe{", "line 2: not UTF-8 (byte 0xff at column 1); save the file as UTF-8"),
        (b'{"text": "caf\xe9"}', "line 2: not UTF-8 (byte 0xe9 at column 14)"),
        (b'{"text": "a"', "line 2: not valid JSON (Expecting ',' delimiter at column 13), got '{\"text\": \"a\"'"),
        (b"[" * 100_000, "line 2: not valid JSON (maximum recursion depth"),
        (b"9" * 5000, "line 2: not valid JSON (Exceeds the limit"),
        (b'["a"]', "line 2: expected a JSON object, got list ['a']; write one JSON object per line"),
        (b"{}", "line 2: unknown shape with keys none; use one of: messages | conversations | input_ids, labels"),
        (b'{"prompt": "a", "answer": "b"}', "line 2: unknown shape with keys answer, prompt; use one of: messages"),
        (b'{"text": 3}', "line 2: text must be a string, got int 3"),
        (b'{"text": "\\ud800"}', "line 2: text must be valid Unicode, got a lone surrogate at character 1"),
        (b'{"instruction": "a", "input": ["b"], "output": "c"}', "line 2: input must be a string, got list ['b']"),
        (b'{"messages": {}}', "line 2: messages must be a list of {role, content}, at least one, got dict {}"),
        (b'{"messages": []}', "line 2: messages must be a list of {role, content}, at least one, got list []"),
        (b'{"messages": ["hi"]}', "line 2: messages[0] must be {role, content}, got 'hi'"),
        (b'{"messages": [{"role": "user", "content": null}]}', "messages[0].content must be a string, got NoneType"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(tmp_path: Path, line: bytes, says: str) -> None:
    path = written(tmp_path, b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(CheckpointError) as caught:
        read_records(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match="holds no records"):
        read_records(written(tmp_path, content))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.jsonl does not exist"):
        read_records(tmp_path / "absent.jsonl")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "prompt", "completion", "instruction", "input", "output", "text", "role"])
            | st.sampled_from(["content", "other"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON_VALUES)
def test_whatever_json_holds_it_is_accepted_or_refused_in_words(value: Any) -> None:
    refused = None
    try:
        check_record(value, "here")
    except CheckpointError as error:
        refused = str(error)
    assert isinstance(value, dict) if refused is None else refused.startswith("here: ")


def test_a_prompt_alone_is_a_record_where_nothing_has_to_be_learned(tmp_path: Path) -> None:
    path = written(tmp_path, b'{"prompt": "a"}\n{"prompt": "a", "completion": "b"}\n')
    assert len(read_records(path, prompts_too=True)) == 2
    with pytest.raises(CheckpointError, match=r"line 1: unknown shape with keys prompt; .* text; or map"):
        read_records(path)
    with pytest.raises(
        CheckpointError,
        match=r"unknown shape with keys question; .* text . prompt; or map",
    ):
        check_record({"question": "a"}, prompts_too=True)
    with pytest.raises(CheckpointError, match="prompt must be a string, got int 3"):
        check_record({"prompt": 3}, prompts_too=True)


def raws(*records: object) -> list[RawRecord]:
    return [RawRecord(f"a.jsonl, line {n}", record, None) for n, record in enumerate(records, 1)]  # type: ignore[arg-type]


def test_nulls_count_as_absent_as_arrow_writes_them() -> None:
    row = {"messages": None, "prompt": "a", "completion": "b", "instruction": None, "text": None}
    (checked,) = checked_records(raws(row), found := Found())
    assert checked.content == check_record({"prompt": "a", "completion": "b"}) and checked.error is None
    assert found == Found(1, Counter({"prompt and completion": 1}))


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}),
        ({"turn": {"q": "a", "a": "b"}}, {"prompt": "turn.q", "completion": "turn.a"}),
        ({"x.q": "a", "x": {"q": "no"}, "y": "b"}, {"prompt": "x.q", "completion": "y"}),
        ({"prompt": "b", "completion": "a"}, {"prompt": "completion", "completion": "prompt"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"completion": "chosen"}),
    ],
)
def test_keys_are_renamed(record: dict[str, Any], fields: dict[str, str]) -> None:
    (checked,) = checked_records(raws(record), Found(), fields)
    assert checked.content == check_record({"prompt": "a", "completion": "b"})


def test_a_renamed_key_that_is_missing_leaves_the_shape_incomplete() -> None:
    (checked,) = checked_records(raws({"question": "a"}), Found(), {"prompt": "question", "completion": "answer"})
    assert checked.error is not None and checked.error.startswith("unknown shape with keys prompt; use one of: ")
    with pytest.raises(ConfigError, match=r"fields must name keys of the shapes \(messages, .*; got 'promt'"):
        check_fields({"promt": "question"})


def test_keys_that_no_shape_reads_are_counted() -> None:
    found = Found()
    list(checked_records(raws({"text": "a", "id": 3}, {"text": "b", "id": 4, "url": "c"}, {"id": 5}), found))
    assert found.unused == {"id": 2, "url": 1} and found.shapes == {"text": 2} and found.records == 3


def test_all_bad_records_are_listed_at_once(tmp_path: Path) -> None:
    lines = [b'{"text": 3}', b'{"text": "fine"}', b"{", b'{"text": 3}', b'{"chosen": "a", "rejected": "b"}']
    path = written(tmp_path, b"\n".join(lines))
    with pytest.raises(CheckpointError) as caught:
        read_records(path)
    message = str(caught.value)
    assert message.startswith(f"4 of 5 records are bad: {path}, line 1, line 4: text must be a string, got int 3;")
    assert f"{path}, line 3: not valid JSON" in message
    assert (
        f"{path}, line 5: is a preference pair (chosen, rejected), of which --task sequence-classification learns"
        in message
    )
    assert message.endswith("correct them, or leave them out with --skip-bad 4")


def test_bad_records_are_allowed_up_to_a_number() -> None:
    bad = BadRecords(allowed=2)
    for line in range(2):
        bad.add(f"a, line {line}", "why")
    bad.check(10)
    bad.add("a, line 9", "why")
    with pytest.raises(CheckpointError, match="3 of 10 records are bad: a, line 0, line 1, line 9: why"):
        bad.check(10)
    for line in range(20_000):
        bad.add(f"a, line {line}", f"why {line}")
    assert bad.count == 20_003 and len(bad.kept) == 10_000


def test_all_places_of_a_reason_are_in_ranges() -> None:
    bad = BadRecords(99)
    for number in (3, 7, 8, 9, 11, 12, 20, 30, 40, 50, 60):
        bad.add(f"a, b.jsonl, line {number}", "wrong")
    bad.add("c.csv, line 4", "wrong")
    bad.add("record 1", "odd")
    assert bad.by_reason() == [
        "a, b.jsonl, lines 3, 7-9, 11-12, 20, 30, 40, 50, 60: wrong",
        "c.csv, line 4: wrong",
        "record 1: odd",
    ]
    assert in_ranges(["row 2", "line 3"]) == "row 2, line 3" and in_ranges(["lines 2-3", "lines 5-6"]) == (
        "lines 2-3, lines 5-6"
    )
