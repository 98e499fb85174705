"""Tests of records of tasks from files: the cache of their tokens, bad records, and what other settings do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.data.tasks.config import TaskDataConfig
from qlora_lite.data.tokenization import tokenize_sources
from qlora_lite.errors import CheckpointError, ConfigError


def test_tokens_are_cached_by_the_length_that_cuts_them(word_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    data, tokenizer = tmp_path / "d.jsonl", word_tokenizer(None)
    rows = [{"text": "a b c d", "kind": "x"}, {"text": "a"}, {"text": "b", "kind": "y"}, {"text": "c", "kind": "z"}]
    data.write_text("\n".join(map(json.dumps, rows)))
    fields = {"label": "kind"}
    made = tokenize_sources([data], tokenizer, TaskDataConfig(2, fields=fields, skip_bad=1, limit=3))
    assert [example.answer for example in made.examples] == ["x", "y"] and made.skipped == 1  # type: ignore[attr-defined]
    assert made.truncated == 1 and made.longest == 2 and not made.parts[0].was_cached
    again = tokenize_sources([data], tokenizer, TaskDataConfig(2, fields=fields, skip_bad=1, limit=3))
    assert again.parts[0].was_cached and again.examples == made.examples and again.truncated == 1
    longer = tokenize_sources([data], tokenizer, TaskDataConfig(4, fields=fields, skip_bad=1, limit=3))
    assert not longer.parts[0].was_cached and longer.longest == 4
    with pytest.raises(CheckpointError, match="line 2: has keys text, and the task sequence-classification needs"):
        tokenize_sources([data], tokenizer, TaskDataConfig(2, fields=fields))


def test_settings_of_answers_are_refused() -> None:
    with pytest.raises(ConfigError, match="learn chooses tokens to learn, and a token-classification learns none"):
        TaskDataConfig(learn="all", task="token-classification")
    with pytest.raises(ConfigError, match=r"the task of records must be one of .*; got 'causal-lm'"):
        TaskDataConfig(task="causal-lm")
