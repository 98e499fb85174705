"""Tests of tokens on disk: what makes a new key, damaged folders, two runs at once, and folders that are removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.data import token_cache
from qlora_lite.data.records import read_records
from qlora_lite.data.sources.source import Source
from qlora_lite.data.token_cache import INDEX_FILE, cache_folder, cache_key, load_tokens
from qlora_lite.data.tokenization import DataConfig, TokenizedSet, tokenize_all, tokenize_sources
from qlora_lite.errors import CheckpointError

TEMPLATE = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": "a b", "completion": "c"}, {"text": "a a a d"}, {"prompt": "d", "completion": "b b"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def start(word_tokenizer: Any) -> Callable[..., TokenizedSet]:
    def started(data: Path, config: DataConfig | None = None, tokenizer: Any = None) -> TokenizedSet:
        return tokenize_sources([data], tokenizer or word_tokenizer(), config)

    return started


def test_a_second_start_reads_the_tokens_of_the_first(
    data: Path, monkeypatch: pytest.MonkeyPatch, start: Any, word_tokenizer: Any
) -> None:
    first = start(data, DataConfig(skip_bad=1))
    monkeypatch.setattr("qlora_lite.data.tokenization.raw_records", None)  # it must not be read again
    second = start(data)
    assert not first.parts[0].was_cached and second.parts[0].was_cached
    assert first.examples == second.examples and first.parts[0].found == second.parts[0].found
    shorter = start(data, DataConfig(max_length=3))
    assert shorter.parts[0].was_cached and (shorter.truncated, shorter.dropped) == (1, 2)
    assert all(len(example.input_ids) <= 3 for example in shorter.examples)
    monkeypatch.undo()
    assert second.examples == tokenize_all(read_records(data), word_tokenizer()).examples
    assert start(data, DataConfig(limit=2)).examples == second.examples[:2]


def test_whatever_decides_on_the_tokens_makes_another_key(data: Path, word_tokenizer: Any) -> None:
    def key(settings: Any = ("learn", "answers"), weight: float | None = None, **changed: Any) -> str | None:
        return cache_key(Source(str(data), weight), word_tokenizer(**changed), dict([settings]))

    keys = {key(), key(("learn", "all")), key(template=TEMPLATE + "!"), key(more="e")}
    assert key() in keys and key(weight=0.5) in keys
    data.write_text(data.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    keys.add(key())
    assert len(keys) == 5 and None not in keys


@pytest.mark.parametrize("damage", ["byte", "short", "missing", "index", "no index"])
def test_damaged_tokens_are_made_again(data: Path, damage: str, start: Any) -> None:
    first = list(start(data).examples)
    (folder,) = cache_folder(Source(str(data))).iterdir()
    tokens = folder / "tokens.safetensors"
    content = tokens.read_bytes()
    if damage == "byte":
        tokens.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "short":
        tokens.write_bytes(content[:-4])
    elif damage == "missing":
        tokens.unlink()
    elif damage == "index":
        (folder / INDEX_FILE).write_text("{}", encoding="utf-8")
    else:
        (folder / INDEX_FILE).unlink()
    again = start(data)
    assert not again.parts[0].was_cached and again.examples == first
    assert start(data).parts[0].was_cached


def test_bad_records_are_remembered_and_counted_again(data: Path, start: Any) -> None:
    data.write_text(data.read_text(encoding="utf-8") + '{"text": 3}\n', encoding="utf-8")
    with pytest.raises(CheckpointError, match="line 4: text must be a string"):
        start(data)
    assert not cache_folder(Source(str(data))).exists(), "a refused set left something behind"
    assert start(data, DataConfig(skip_bad=1)).skipped == 1
    kept = start(data, DataConfig(skip_bad=5))
    assert kept.parts[0].was_cached and kept.skipped == 1
    with pytest.raises(CheckpointError, match="line 4: text must be a string"):
        start(data)


@pytest.mark.parametrize("content", ["", '{"text": 3}\n'])
def test_of_a_set_without_a_good_record_nothing_is_kept(data: Path, start: Any, content: str) -> None:
    data.write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match="there is nothing to train on"):
        start(data, DataConfig(skip_bad=1))
    assert [path.name for path in data.parent.iterdir()] == [data.name]


def test_runs_that_race_do_not_disturb_each_other(data: Path, start: Any) -> None:
    expected = list(start(data).examples)
    for folder in cache_folder(Source(str(data))).iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    found: list[Any] = []

    def run() -> None:
        try:
            found.extend(list(start(data).examples) for _ in range(5))
        except Exception as error:  # shown by the assertion
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 20


def test_a_killed_start_leaves_nothing_that_is_used(tmp_path: Path, start: Any, word_tokenizer: Any) -> None:
    data = tmp_path / "long.jsonl"
    lines = [json.dumps({"prompt": "a b c", "completion": "d " * (n % 9)}) for n in range(8_000)]
    data.write_text("\n".join(lines), encoding="utf-8")
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    program = (
        "import sys; from transformers import AutoTokenizer; from qlora_lite.data import tokenize_sources;"
        "words = AutoTokenizer.from_pretrained(sys.argv[2]);"
        "tokenize_sources([sys.argv[1]], words, show=lambda n: print(n, flush=True))"
    )
    words = [sys.executable, "-c", program, str(data), str(tmp_path / "tokenizer")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 256:
                break
        process.kill()
    assert process.returncode == -signal.SIGKILL
    (unfinished,) = cache_folder(Source(str(data))).iterdir()
    assert unfinished.name.endswith(".partial")
    assert not start(data).parts[0].was_cached
    assert start(data).parts[0].was_cached


def test_few_folders_are_kept(data: Path, start: Any) -> None:
    for limit in range(1, 4):
        start(data, DataConfig(limit=limit))
    folder = cache_folder(Source(str(data)))
    (oldest,) = [path for path in folder.iterdir() if load_tokens(path)[1]["records"] == 1]  # type: ignore[index]
    for age, path in enumerate(folder.iterdir()):
        os.utime(path, (1000 + age, 1000 + age))
    os.utime(oldest, (1, 1))
    for learn in ("all", "last-answer"):
        start(data, DataConfig(learn=learn))
    assert len(list(folder.iterdir())) == token_cache.KEPT_FOLDERS and not oldest.exists()


def test_a_folder_that_cannot_be_written_has_its_tokens_elsewhere(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, start: Any
) -> None:
    def refuse(path: Path) -> None:
        raise CheckpointError("pretended: the tests run as root")

    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "check_creatable", refuse)
    start(data)
    monkeypatch.undo()
    assert not cache_folder(Source(str(data))).exists()
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_names_have_no_colon_which_windows_forbids(data: Path) -> None:
    for location in (f"{data.parent}:train", "org/name:config:train[:10%]"):
        if "org" not in location:
            (data.parent / "train.jsonl").touch()
        assert ":" not in cache_folder(Source(location)).name


def test_a_slow_tokenizer_has_no_cache(data: Path, start: Any, word_tokenizer: Any) -> None:
    slow = word_tokenizer()
    monkey = type("Slow", (type(slow),), {"is_fast": False})
    slow.__class__ = monkey
    assert cache_key(Source(str(data)), slow, {}) is None
    assert start(data, None, slow).examples == start(data).examples
