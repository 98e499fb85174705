"""Tests of sources: what the user names, and which files, fingerprint and records that gives."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from qlora_lite.data.sources import source as module
from qlora_lite.data.sources.hub_dataset import HubDataset
from qlora_lite.data.sources.raw import RawRecord
from qlora_lite.data.sources.source import Source, files_of, fingerprint, parse_source, raw_records
from qlora_lite.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a.jsonl", Source("a.jsonl")),
        ("a.jsonl=0.7", Source("a.jsonl", 0.7)),
        ("a.jsonl=3", Source("a.jsonl", 3.0)),
        ("a.jsonl=1e-3", Source("a.jsonl", 0.001)),
        ("run=3/a.jsonl=2", Source("run=3/a.jsonl", 2.0)),
        ("org/name:config:train=2", Source("org/name:config:train", 2.0)),
    ],
)
def test_a_number_behind_the_last_equals_sign_is_the_weight(text: str, source: Source) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize("name", ["run=3.jsonl", "a.jsonl=0.7", "a="])
def test_a_path_that_exists_stays_a_path(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert parse_source(f"{tmp_path}/{name}") == Source(f"{tmp_path}/{name}")
    assert parse_source(f"{tmp_path}/{name}=2") == Source(f"{tmp_path}/{name}", 2.0)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "-inf", "0,7", "", "1e999"])
def test_a_weight_is_finite_and_above_zero(weight: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_source(f"a.jsonl={weight}")
    assert f"a finite number above 0; got '{weight}' in 'a.jsonl={weight}'" in str(caught.value)


@pytest.mark.parametrize("text", ["", "=0.5"])
def test_a_source_has_a_name(text: str) -> None:
    with pytest.raises(ConfigError, match="needs a path or a name"):
        parse_source(text)


def test_a_file_is_read_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text"\n{"text": "b"}\n')
    first, wrong, last = raw_records(Source(str(path)))
    assert first == RawRecord(f"{path}, line 1", {"text": "a"}, None)
    assert last == RawRecord(f"{path}, line 4", {"text": "b"}, None)
    assert wrong.place == f"{path}, line 3"
    assert files_of(Source(str(path))) == [path]


@pytest.mark.parametrize(
    "location",
    ["absent.jsonl", "data.jsnl", "C:\\x", "org/name", "a/b/c:train", "chats.jsonl:train", "x\x00", "folder/:"],
)
def test_what_is_neither_file_nor_data_set_does_not_exist(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for read in (lambda: list(raw_records(Source(location))), lambda: fingerprint(Source(location))):
        with pytest.raises(CheckpointError, match=r"does not exist; name a file|cannot read 'x\\x00': embedded null"):
            read()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    source = Source(str(tmp_path / "absent.jsonl"))
    for read in (lambda: list(raw_records(source)), lambda: fingerprint(source)):
        with pytest.raises(
            CheckpointError, match=r"absent\.jsonl does not exist; name a file, a folder, or a data set"
        ):
            read()


def test_fingerprint_is_of_bytes_and_name(tmp_path: Path) -> None:
    found = set()
    for folder, name, content in [("a", "a.jsonl", b"1"), ("b", "a.jsonl", b"1")]:
        path = tmp_path / folder / name
        path.parent.mkdir()
        path.write_bytes(content)
        found.add(fingerprint(Source(str(path))))
    assert len(found) == 1
    assert all(len(digest) == 64 for digest in found)
    (tmp_path / "a" / "a.jsonl").write_bytes(b"2")
    (tmp_path / "b" / "a.jsonl").rename(tmp_path / "b" / "b.jsonl")
    found.add(fingerprint(Source(str(tmp_path / "a" / "a.jsonl"))))
    found.add(fingerprint(Source(str(tmp_path / "b" / "b.jsonl"))))
    assert len(found) == 3


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.csv").write_bytes(b"text\n1\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "2"}\n')
    source = Source(f"{tmp_path}/")
    assert files_of(source) == [tmp_path / "a.jsonl", tmp_path / "b" / "a.csv"]
    assert [(record.place, record.value) for record in raw_records(source)] == [
        (f"{tmp_path}/a.jsonl, line 1", {"text": "2"}),
        (f"{tmp_path}/b/a.csv, line 2", {"text": "1"}),
    ]
    first = fingerprint(source)
    (tmp_path / "README.md").write_text("more about it")
    assert fingerprint(Source(str(tmp_path))) == first
    (tmp_path / "b" / "a.csv").rename(tmp_path / "b" / "b.csv")
    assert fingerprint(source) != first


def test_a_split_of_a_folder_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f'{{"text": "{split}"}}\n')
    with pytest.raises(CheckpointError, match="holds several splits: train, test; name one of them"):
        list(raw_records(Source(str(tmp_path))))
    source = Source(f"{tmp_path}:train")
    assert files_of(source) == [tmp_path / "train.jsonl"]
    assert [record.value for record in raw_records(source)] == [{"text": "train"}]
    assert fingerprint(source) != fingerprint(Source(f"{tmp_path}:test"))
    with pytest.raises(CheckpointError, match="has no split 'dev'; it has train, test"):
        files_of(Source(f"{tmp_path}:dev"))


def test_simulated_a_path_of_windows_has_no_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "C").mkdir()
    (tmp_path / "C" / "data.jsonl").write_text('{"text": "a"}')
    monkeypatch.chdir(tmp_path)
    for name in ("C:\\data.jsonl", "C:/data.jsonl"):
        with pytest.raises(CheckpointError, match="does not exist; name a file, a folder"):
            files_of(Source(name))
    assert parse_source("C:\\data.jsonl=0.5") == Source("C:\\data.jsonl", 0.5)


def test_simulated_a_name_that_windows_forbids_may_be_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> None:
        error = OSError(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect")
        error.winerror = 123  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(module.os, "lstat", forbidden)
    assert files_of(Source("org/name:en:train")) == []


def test_a_data_set_of_the_hub_has_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    named = []
    monkeypatch.setattr(module, "hub_records", lambda name: named.append(name) or iter([RawRecord("a", {}, None)]))
    monkeypatch.setattr(module, "hub_fingerprint", lambda name: f"of {name}")
    source = Source("org/name:en:train", 2.0)
    assert files_of(source) == []
    assert list(raw_records(source)) == [RawRecord("a", {}, None)]
    assert named == [HubDataset("org/name", "en", "train")]
    assert fingerprint(source) == "of org/name:en:train"


def test_a_file_whose_name_has_the_form_of_a_data_set_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("name:train").write_bytes(b'{"text": "a"}')
    assert [record.value for record in raw_records(Source("name:train"))] == [{"text": "a"}]


def test_only_files_that_end_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name, says in [("pipe", "is a pipe, socket or device"), ("link", "does not exist")]:
        for read in (
            lambda name=name: list(raw_records(Source(f"{tmp_path}/{name}"))),
            lambda name=name: fingerprint(Source(f"{tmp_path}/{name}")),
        ):
            with pytest.raises(CheckpointError, match=f"{name} {says}"):
                read()


def test_a_path_that_cannot_be_looked_at_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"cannot read '/x+\.\.\.: File name too long"):
        files_of(Source("/" + "x" * 5000))
