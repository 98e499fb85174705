"""Tests of the three lines about records of a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_lite.data.tasks.config import TaskDataConfig
from qlora_lite.data.tasks.labels import find_labels
from qlora_lite.data.tasks.summary import summarize_task
from qlora_lite.data.tokenization import tokenize_sources


def test_what_becomes_of_records_in_words(word_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    rows: list[dict[str, Any]] = [{"text": "a b c", "label": "x", "id": 1}, {"text": "a", "label": "y"}, {"text": "a"}]
    data.write_text("\n".join(map(json.dumps, rows)))
    found = tokenize_sources([data], word_tokenizer(None), TaskDataConfig(2, skip_bad=1), cache=False)
    labels = find_labels(found.examples, "sequence-classification")
    summary = summarize_task(found, labels)
    assert summary.in_words(labels) == [
        "3 records (2 text and label), 2 examples; keys not used: id",
        "3 tokens; texts of 1 to 2 tokens, median 1; 1 shortened, 1 bad records left out",
        "2 labels: x (1), y (1)",
    ]
    assert summary.to_json()["labels"] == {"x": 1, "y": 1} and summary.to_json()["kind"] == "classes"
