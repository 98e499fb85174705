"""Tests of reading JSONL: four shapes in one file, and an error with file and line for anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.data.records import check_record, read_records
from qlora_lite.errors import CheckpointError

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
        (b"{}", "line 2: unknown shape with keys none; use one of: messages | prompt, completion | instruction"),
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


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.jsonl does not exist"):
        read_records(tmp_path / "absent.jsonl")
    with pytest.raises(CheckpointError, match="is a folder; expected a JSONL file"):
        read_records(tmp_path)


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
    with pytest.raises(CheckpointError, match=r"line 1: unknown shape with keys prompt; use one of: .* text$"):
        read_records(path)
    with pytest.raises(CheckpointError, match=r"unknown shape with keys question; use one of: .* text . prompt$"):
        check_record({"question": "a"}, prompts_too=True)
    with pytest.raises(CheckpointError, match="prompt must be a string, got int 3"):
        check_record({"prompt": 3}, prompts_too=True)
