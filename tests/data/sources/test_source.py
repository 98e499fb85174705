"""Tests of sources: what the user names, and which files, fingerprint and records that gives."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    source = Source(str(tmp_path / "absent.jsonl"))
    for read in (lambda: list(raw_records(source)), lambda: fingerprint(source)):
        with pytest.raises(CheckpointError, match=r"absent\.jsonl does not exist; expected a data file"):
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
