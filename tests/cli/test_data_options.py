"""Tests of the options that commands with records share."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.cli.data_options import (
    data_config,
    fields_named,
    input_paths,
    run_date_of,
    training_data,
)
from qlora_lite.data.tokenization import DataConfig
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.progress import work as progress
from qlora_lite.progress.work import progress_shown

OPTIONS = {
    "max_length": 64,
    "learn": "all",
    "learn_empty_reasoning": False,
    "field": ["prompt=q", "completion=a=b"],
    "limit": 3,
    "skip_bad": 1,
}


def test_fields_are_key_and_name() -> None:
    assert fields_named(None) == {} and fields_named(["prompt=q", "completion=a=b"]) == {
        "prompt": "q",
        "completion": "a=b",
    }
    for wrong in ("prompt", "=q", "prompt="):
        with pytest.raises(ConfigError, match=f"--field must be KEY=NAME, as prompt=question; got '{wrong}'"):
            fields_named([wrong])
    with pytest.raises(ConfigError, match="--field names prompt twice: a and b"):
        fields_named(["prompt=a", "prompt=b"])


def test_every_option_reaches_the_settings() -> None:
    expected = DataConfig(64, "all", False, {"prompt": "q", "completion": "a=b"}, 3, 1, date=date(2026, 1, 2))
    assert data_config(OPTIONS, date(2026, 1, 2)) == expected


def test_inputs_are_the_paths_that_exist(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("", encoding="utf-8")
    assert input_paths([f"{path}=0.5", "org/name:train", str(tmp_path)]) == [path, tmp_path]


def test_what_is_held_out_is_a_share_or_another_source(tmp_path: Path, word_tokenizer: Any) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps({"text": f"{'a ' * n}b"}) + "\n" for n in range(1, 11)), encoding="utf-8")
    other.write_text('{"text": "c c"}\n{"text": "a a b"}\n', encoding="utf-8")
    config = DataConfig(64)
    shared = training_data([str(path)], None, 0.2, word_tokenizer(), config, cache=False)
    assert shared.held_out is not None and (len(shared.examples), len(shared.held_out)) == (8, 2)
    assert shared.warning() is None
    apart = training_data([str(path)], [str(other)], None, word_tokenizer(), config, cache=False)
    assert apart.held_out is not None and (len(apart.examples), len(apart.held_out)) == (10, 2)
    assert apart.warning() == "1 of the held-out examples are trained on too"
    assert training_data([str(path)], None, None, word_tokenizer(), config, cache=False).held_out is None
    with pytest.raises(ConfigError, match="--eval-data and --eval-share both choose what is held out"):
        training_data([str(path)], [str(other)], 0.1, word_tokenizer(), config, cache=False)


def test_records_are_counted_while_they_are_tokenized(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, word_tokenizer: Any
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b"}\n' * 300, encoding="utf-8")
    monkeypatch.setattr(progress, "LINE_AFTER", 0.0)
    with progress_shown():
        training_data([str(path)], None, None, word_tokenizer(), DataConfig(64), cache=False)
    captured = capsys.readouterr()
    assert captured.err == "tokenizing: 0 records after 0 seconds\n" and captured.out == ""


def test_a_resumed_run_writes_the_date_of_its_start(tmp_path: Path) -> None:
    assert run_date_of(tmp_path) == date.today()
    (tmp_path / "data.json").write_text('{"date": "2025-02-03"}', encoding="utf-8")
    assert run_date_of(tmp_path) == date(2025, 2, 3)
    for wrong in ("{}", '{"date": 3}', '{"date": "soon"}'):
        (tmp_path / "data.json").write_text(wrong, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"data.json has no date of the run; delete it to go on with today's"):
            run_date_of(tmp_path)
