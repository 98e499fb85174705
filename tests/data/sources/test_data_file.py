"""Tests of the kinds of files: content tells them apart, whatever the name, and other kinds are named."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_lite.data.sources.data_file import file_records, text_suffix
from qlora_lite.errors import CheckpointError

ROWS = [{"prompt": "héllo", "completion": "wörld"}, {"prompt": 'say "hi",\nplease', "completion": "hi"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=2).encode()
INSIDE = json.dumps({"data": ROWS}).encode()
CSV = 'prompt,completion\nhéllo,wörld\n"say ""hi"",\nplease",hi\n'.encode()
TSV = CSV.replace(b'"say ""hi"",', b'"say ""hi"";').replace(b",", b"\t").replace(b'"";', b'"",')


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


def arrow(new: Callable[..., Any]) -> bytes:
    file, table = pa.BufferOutputStream(), pa.Table.from_pylist(ROWS)
    with new(file, table.schema) as writer:
        writer.write_table(table)
    return bytes(file.getvalue())


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, "zstd", asbytes=True))


TABLES = [parquet(), arrow(pa.ipc.new_file), arrow(pa.ipc.new_stream)]
CASES = [
    *((name, content) for name in ("a.jsonl", "a.json", "a", "a.txt", "a.gz") for content in (LINES, ARRAY, INSIDE)),
    *((name, content) for name in ("a.parquet", "a.arrow", "a.jsonl", "a.csv", "a") for content in TABLES),
    *(
        (name, pack(text))
        for name in ("a.jsonl.gz", "a.json", "a.zst")
        for text in (LINES, ARRAY, INSIDE)
        for pack in (gzip.compress, zstd)
    ),
    *((name, CSV) for name in ("a.csv", "A.CSV", "a.csv.gz")),
    *((name, pack(CSV)) for name in ("a.csv", "a.csv.gz", "a.CSV.ZST", "a.csv.zstd") for pack in (gzip.compress, zstd)),
    *((name, pack(TSV)) for name in ("a.tsv", "a.tsv.gz", "a.tsv.zst") for pack in (bytes, gzip.compress, zstd)),
]


@pytest.mark.parametrize(("name", "content"), CASES, ids=[f"{number} {name}" for number, (name, _) in enumerate(CASES)])
def test_every_kind_gives_the_same_records(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = list(file_records(path))
    assert [record.value for record in found] == ROWS
    assert {record.error for record in found} == {None}
    assert all(record.place.startswith(f"{path}, ") for record in found)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"PK\x03\x04\x14\x00", "is a zip archive or a spreadsheet; expected JSON Lines, JSON, CSV or TSV"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00\x00", "is compressed by xz"),
        ("a.csv", LINES.decode().encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
        ("a.jsonl", LINES.decode().encode("utf-16-le"), "begins with b'{\\x00"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(LINES)), "is compressed twice; expected"),
        ("a.parquet.gz", gzip.compress(TABLES[0]), "is a table inside of gzip; decompress it"),
        ("a.arrow.zst", zstd(TABLES[2]), "is a table inside of zstd; decompress it"),
        ("a.parquet", b"", "is empty, so it is damaged or of another kind"),
        ("a.jsonl.gz", b"", "is empty, so it is damaged or of another kind"),
        ("a.arrow", b"ARR\xff\xff", "begins with b'ARR\\xff\\xff', so it is damaged"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-1], "cannot be decompressed: "),
        ("a.parquet", TABLES[0][:-1], "cannot be read as parquet: "),
        ("a.csv", b"", "is empty; begin it with a header"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        list(file_records(path))
    assert str(caught.value).startswith(f"{path} {says}")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"[]", b"prompt,completion\n"])
def test_a_file_may_have_no_records(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ("a.csv" if b"," in content else "a.json")
    path.write_bytes(content)
    assert list(file_records(path)) == []


def test_text_that_is_cut_within_a_character_is_text(tmp_path: Path) -> None:
    for shift in range(3):
        path = tmp_path / "a.gz"
        path.write_bytes(b'{"a": "' + b"x" * shift + "€".encode() * 3000 + b'"}')
        assert [record.error for record in file_records(path)] == [None]


def test_suffixes() -> None:
    assert [text_suffix(Path(name)) for name in ("a.CSV.gz", "a.b.tsv", "a.gz", "a")] == [".csv", ".tsv", "", ""]
