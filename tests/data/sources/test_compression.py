"""Tests of gzip and zstd: found by content, read in pieces, and every damage is an error that names the file."""

from __future__ import annotations

import bz2
import gzip
import os
import struct
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from qlora_lite.data.sources.compression import compression_of, opened
from qlora_lite.errors import CheckpointError

TEXT = b"".join(b'{"n": %d}\n' % number for number in range(5000))


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, "zstd", asbytes=True))


def written(folder: Path, content: bytes) -> Path:
    path = folder / "a.jsonl"  # the name never tells
    path.write_bytes(content)
    return path


SKIPPED = struct.pack("<II", 0x184D2A53, 5) + b"notes"
CONTENTS = {
    "plain": TEXT,
    "gzip": gzip.compress(TEXT),
    "gzip in two members": gzip.compress(TEXT[:999]) + gzip.compress(TEXT[999:]),
    "gzip with padding": gzip.compress(TEXT) + b"\x00" * 100,
    "zstd": zstd(TEXT),
    "zstd in two frames": zstd(TEXT[:999]) + zstd(TEXT[999:]),
    "zstd behind a skipped frame": SKIPPED + zstd(TEXT),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_content_is_decompressed(tmp_path: Path, content: bytes) -> None:
    with opened(written(tmp_path, content)) as file:
        assert file.readline() == b'{"n": 0}\n'
        assert b'{"n": 0}\n' + file.read() == TEXT


@pytest.mark.parametrize("name", [name for name in CONTENTS if name != "plain"])
def test_compression_is_named(name: str) -> None:
    assert compression_of(CONTENTS[name][:4]) == name.split()[0]
    assert compression_of(TEXT) is compression_of(b"") is compression_of(bz2.compress(TEXT)) is None


@pytest.mark.parametrize("name", ["gzip", "zstd", "zstd in two frames"])
@pytest.mark.parametrize("cut", [1, 5, 500])
def test_a_part_of_a_file_is_an_error(tmp_path: Path, name: str, cut: int) -> None:
    path = written(tmp_path, CONTENTS[name][:-cut])
    with (
        pytest.raises(
            CheckpointError, match=f"^{path} cannot be decompressed: .*; the {name.split()[0]} file is damaged"
        ),
        opened(path) as file,
    ):
        file.read()


@pytest.mark.parametrize("content", [CONTENTS["gzip"] + b"more", CONTENTS["zstd"] + b"more", b"\x1f\x8b\x08\x00broken"])
def test_other_bytes_are_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match="cannot be decompressed"), opened(written(tmp_path, content)) as file:
        file.read()


def test_a_wrong_checksum_is_an_error(tmp_path: Path) -> None:
    content = bytearray(CONTENTS["gzip"])
    content[-8] ^= 1
    with pytest.raises(CheckpointError, match="CRC check failed"), opened(written(tmp_path, bytes(content))) as file:
        file.read()


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_bomb_is_decompressed_a_buffer_at_a_time(tmp_path: Path, kind: str) -> None:
    zeros = b"0" * (100 << 20)
    path = written(tmp_path, gzip.compress(zeros, 1) if kind == "gzip" else zstd(zeros))
    assert path.stat().st_size < 1 << 20
    del zeros
    size, before = 0, pa.total_allocated_bytes()
    tracemalloc.start()
    with opened(path) as file:
        while piece := file.read(1 << 20):
            size += len(piece)
            assert pa.total_allocated_bytes() - before < 4 << 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 100 << 20
    assert peak < 8 << 20


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, says in [(tmp_path / "pipe", "is a pipe"), (tmp_path, "is a folder"), (tmp_path / "x", "does not exist")]:
        with pytest.raises(CheckpointError, match=f"{says}.*expected a data file"), opened(path):
            pass


def test_the_file_is_closed(tmp_path: Path) -> None:
    for content in CONTENTS.values():
        with opened(written(tmp_path, content)) as file:
            file.readline()
        assert not [
            link for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link).startswith(str(tmp_path))
        ]
