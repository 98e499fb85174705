"""Tests of prompts from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.generation.prompts import Prompts
from qlora_lite.generation.record_prompts import PromptSet, Room, read_prompts

ROOM = Room(None, 10)


@pytest.fixture
def prompts(tokenizer: Any) -> Prompts:
    return Prompts(tokenizer)


def written(path: Path, *records: object) -> str:
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return str(path)


def test_records_and_lines_keep_their_order(prompts: Prompts, tmp_path: Path) -> None:
    records = [{"q": "one", "a": "two"}, {"messages": [{"role": "user", "content": "three"}]}, {"text": "four"}]
    sources = [written(tmp_path / "a.jsonl", *records), written(tmp_path / "b.txt", "five", "", "six <user>")]
    found = read_prompts(sources, prompts, ROOM, {"prompt": "q", "completion": "a"}).prompts
    assert [prompt.shown for prompt in found] == [
        *("one", [{"role": "user", "content": "three"}], "four", "five", "six <user>")
    ]
    assert [prompt.expected for prompt in found] == ["two", None, None, None, None]
    assert list(found[3].tokens) == prompts.of_conversation([{"role": "user", "content": "five"}])
    limited = read_prompts(sources, prompts, ROOM, {"prompt": "q", "completion": "a"}, limit=1)
    assert [prompt.shown for prompt in limited.prompts] == ["one", "five"]


def test_bad_records_are_listed_or_left_out(prompts: Prompts, tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", {"text": "ok"}, {"x": 1}, {"text": "t" * 20}, "{")
    with pytest.raises(CheckpointError) as refused:
        read_prompts([source], prompts, Room(20, 10))
    said = str(refused.value)
    assert said.startswith("3 of 4 records are bad: ") and "line 2: unknown shape with keys x" in said
    assert "line 3: has 20 tokens and an answer of up to 10, and the model was made for 20 positions; shorten" in said
    assert "line 4: not valid JSON" in said
    found = read_prompts([source], prompts, Room(20, 10), skip_bad=3)
    assert found.skipped == 3 and [prompt.shown for prompt in found.prompts] == ["ok"]


def test_what_is_no_source_of_prompts(prompts: Prompts, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(b"good\n\xff\n")
    with pytest.raises(
        CheckpointError, match=r"a.txt, line 2: not UTF-8 \(byte 0xff at column 1\); save the file as UTF"
    ):
        read_prompts([str(text)], prompts, ROOM)
    text.write_text("\n\n")
    with pytest.raises(CheckpointError, match=r"a.txt holds no prompts; expected records, or a line of text for each"):
        read_prompts([str(text)], prompts, ROOM)
    with pytest.raises(
        ConfigError, match=r"a.txt=0.5: prompts are answered once each, so a source has no share; leave"
    ):
        read_prompts([f"{text}=0.5"], prompts, ROOM)


def test_the_fingerprint_is_of_tokens_and_their_ends(prompts: Prompts, tmp_path: Path) -> None:
    def of(*texts: str) -> str:
        return read_prompts(
            [written(tmp_path / "a.jsonl", *({"text": text} for text in texts))], prompts, ROOM
        ).fingerprint()

    assert of("ab", "c") == of("ab", "c") != of("a", "bc")
    assert PromptSet([]).fingerprint() != of("ab", "c")
