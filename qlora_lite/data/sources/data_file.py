"""Records of one file. Its first bytes say what it is; only CSV and TSV are known by their names."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from qlora_lite.checkpoints.files import excerpt, open_regular
from qlora_lite.data.sources.arrow_tables import arrow_records, parquet_records
from qlora_lite.data.sources.compression import EXPECTED, compression_of, opened
from qlora_lite.data.sources.delimited import DELIMITERS, delimited
from qlora_lite.data.sources.json_document import json_document
from qlora_lite.data.sources.json_layout import spans_lines
from qlora_lite.data.sources.json_lines import json_lines
from qlora_lite.data.sources.raw import RawRecord
from qlora_lite.errors import CheckpointError

KINDS = "JSON Lines, JSON, CSV or TSV, also in gzip or zstd, parquet or Arrow"
HEAD = 4096
PACKED_SUFFIXES = (".gz", ".zst", ".zstd")
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
PARQUET = (b"PAR1", b"PARE")
ARROW_FILE = b"ARROW1\x00\x00"
ARROW_STREAM = b"\xff\xff\xff\xff"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
OTHERS = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"SQLite format 3\x00": "a database of SQLite",
    b"%PDF": "a PDF",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"FEA1": "a Feather file of version 1",
}


def text_suffix(path: Path) -> str:
    """Returns the suffix in lower case, that of the compression left out: `.csv` of `a.CSV.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED_SUFFIXES else suffix


def file_records(path: Path) -> Iterator[RawRecord]:
    """Yields the records of a file, those that cannot be read with the reason.

    Raises CheckpointError if the file cannot be read, or is not of a kind that is known.
    """
    with opened(path) as file:
        head = file.read(HEAD)
    if head.startswith((*PARQUET, ARROW_FILE, ARROW_STREAM)):
        yield from _table_records(path, head)
        return
    _check_text(path, head)
    suffix = text_suffix(path)
    with opened(path) as file:
        one_text = suffix not in DELIMITERS and spans_lines(file)
    with opened(path) as file:
        if suffix in DELIMITERS:
            yield from delimited(file, str(path), DELIMITERS[suffix])
        else:
            yield from json_document(file, str(path)) if one_text else json_lines(file, str(path))


def _table_records(path: Path, head: bytes) -> Iterator[RawRecord]:
    with open_regular(path, EXPECTED) as file:
        if compression := compression_of(file.read(4)):
            raise CheckpointError(f"{path} is a table inside of {compression}; decompress it")
    if head.startswith(PARQUET):
        return parquet_records(path)
    return arrow_records(path, stream=head.startswith(ARROW_STREAM))


def _check_text(path: Path, head: bytes) -> None:
    """Raises CheckpointError if a file begins as binary files do."""
    other = next((name for magic, name in OTHERS.items() if head.startswith(magic)), None)
    if other is not None or compression_of(head):
        raise CheckpointError(f"{path} is {other or 'compressed twice'}; expected {KINDS}")
    if head.startswith(UTF16):
        raise CheckpointError(f"{path} is text in UTF-16; save it as UTF-8")
    binary = b"\x00" in head
    if binary or (path.suffix.lower() in (*PACKED_SUFFIXES, *TABLE_SUFFIXES) and not _is_text(head)):
        got = f"begins with {excerpt(head[:16])}" if head else "is empty"
        raise CheckpointError(f"{path} {got}, so it is damaged or of another kind; expected {KINDS}")


def _is_text(head: bytes) -> bool:
    """Whether the beginning of a file is text and not empty; a character may be cut at its end."""
    try:
        return bool(codecs.getincrementaldecoder("utf-8")().decode(head))
    except UnicodeDecodeError:
        return False
