"""Tests of the options that commands with records share."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.cli import data_options
from qlora_lite.cli.data_options import (
    data_config,
    fields_named,
    input_paths,
    run_date_of,
    tokenizing_progress,
    training_data,
)
from qlora_lite.data.tokenization import DataConfig
from qlora_lite.errors import CheckpointError, ConfigError

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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_on_a_terminal_alone_and_vanishes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, word_tokenizer: Any
) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text('{"text": "a b"}\n' * 300, encoding="utf-8")
    other.write_text('{"text": "c"}\n' * 129, encoding="utf-8")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    shown: list[int] = []

    @contextmanager
    def followed() -> Iterator[Callable[[int], None]]:
        with tokenizing_progress() as show:
            assert show is not None
            yield lambda count: (shown.append(count), show(count))[1]

    with monkeypatch.context() as patch:
        patch.setattr(data_options, "tokenizing_progress", followed)
        training_data([str(path)], [str(other)], None, word_tokenizer(), DataConfig(64), cache=False)
    assert shown == [0, 128, 256, 0, 128] and "records are tokenized" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[1A\x1b[2K")  # the line is gone
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    with tokenizing_progress() as show:
        assert show is None
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("RANK", "1")
    with tokenizing_progress() as show:
        assert show is None


def test_a_resumed_run_writes_the_date_of_its_start(tmp_path: Path) -> None:
    assert run_date_of(tmp_path) == date.today()
    (tmp_path / "data.json").write_text('{"date": "2025-02-03"}', encoding="utf-8")
    assert run_date_of(tmp_path) == date(2025, 2, 3)
    for wrong in ("{}", '{"date": 3}', '{"date": "soon"}'):
        (tmp_path / "data.json").write_text(wrong, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"data.json has no date of the run; delete it to go on with today's"):
            run_date_of(tmp_path)
