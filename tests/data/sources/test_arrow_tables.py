"""Tests of parquet and Arrow files, written by pyarrow and by datasets: values, places, damage and memory."""

from __future__ import annotations

import datetime
import decimal
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_lite.data.sources.arrow_tables import arrow_records, parquet_records, row_records, zstd_stream
from qlora_lite.data.sources.raw import RawRecord
from qlora_lite.errors import CheckpointError

Read = Callable[[Path], list[RawRecord]]

ROWS: list[dict[str, Any]] = [
    {
        "messages": [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": None}],
        "scores": {"a": 1, "b": 2},
        "day": datetime.date(2024, 2, 29),
        "raw": b"\x00\xff",
        "price": decimal.Decimal("1.50"),
    },
    {"messages": [], "scores": None, "day": None, "raw": None, "price": None},
]
SCHEMA = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "scores": pa.map_(pa.string(), pa.int64()),
        "day": pa.date32(),
        "raw": pa.binary(),
        "price": pa.decimal128(5, 2),
    }
)


def table(rows: list[dict[str, Any]]) -> Any:
    return pa.Table.from_pylist(
        [{**row, "scores": row["scores"] and list(row["scores"].items())} for row in rows], SCHEMA
    )


def write_parquet(path: Path, content: Any) -> None:
    pq.write_table(content, path, row_group_size=1700)


def write_file(path: Path, content: Any) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, content.schema) as writer:
        writer.write_table(content)


def write_stream(path: Path, content: Any) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content, max_chunksize=1300)


def read_parquet(path: Path) -> list[RawRecord]:
    return list(parquet_records(path))


def read_file(path: Path) -> list[RawRecord]:
    return list(arrow_records(path, stream=False))


def read_stream(path: Path) -> list[RawRecord]:
    return list(arrow_records(path, stream=True))


KINDS = pytest.mark.parametrize(
    ("write", "read"), [(write_parquet, read_parquet), (write_file, read_file), (write_stream, read_stream)]
)


@KINDS
def test_rows_are_python_values(tmp_path: Path, write: Callable[[Path, Any], None], read: Read) -> None:
    path = tmp_path / "a"
    write(path, table(ROWS * 2000))
    found = read(path)
    assert [record.value for record in found] == ROWS * 2000
    assert [record.place for record in found] == [f"{path}, row {number}" for number in range(1, 4001)]
    assert {record.error for record in found} == {None}


@KINDS
def test_json_text_of_datasets_is_parsed(tmp_path: Path, write: Callable[[Path, Any], None], read: Read) -> None:
    """`datasets` stores values of mixed types as text of Arrow's JSON type, inside of lists and structs too."""
    calls = pa.ListArray.from_arrays([0, 3, 3], pa.array(['{"a": 1}', None, '"b"'], pa.json_()))
    more = pa.MapArray.from_arrays([0, 1, 1], pa.array(["k"]), pa.array(["[1, 2]"], pa.json_()))
    nested = pa.StructArray.from_arrays([calls, more], names=["calls", "more"])
    write(tmp_path / "a", pa.table({"x": nested, "y": pa.array(['{"z": "é"}', None], pa.json_())}))
    assert [record.value for record in read(tmp_path / "a")] == [
        {"x": {"calls": [{"a": 1}, None, "b"], "more": {"k": [1, 2]}}, "y": {"z": "é"}},
        {"x": {"calls": [], "more": {}}, "y": None},
    ]


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([[("k", 1)], [("k", 1), ("k", 2)], None], pa.map_(pa.string(), pa.int64())), "duplicate key"),
        (pa.array(["1", "{", "2"], pa.json_()), "Expecting property name"),
        (pa.array([0, 10**12, 1], pa.timestamp("s")), "out of range"),
        (pa.array([b"a", b"\xff", b"b"]).view(pa.string()), "can't decode byte 0xff"),
    ],
)
def test_a_row_that_python_cannot_hold_does_not_stop_the_reading(column: Any, says: str) -> None:
    first, wrong, last = row_records([pa.table({"n": [1, 2, 3], "x": column})], "a.parquet")
    assert (first.value or {})["n"] == 1
    assert (last.value or {})["n"] == 3
    assert (wrong.place, wrong.value) == ("a.parquet, row 2", None)
    assert says in str(wrong.error)
    assert str(wrong.error).endswith("; change it, or leave the row out")


def test_columns_of_one_name_are_refused() -> None:
    content = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["a", "b", "a"])
    with pytest.raises(CheckpointError, match=r"a\.parquet has several columns named a; rename them"):
        list(row_records([content], "a.parquet"))


@KINDS
def test_a_part_of_a_file_is_refused(tmp_path: Path, write: Callable[[Path, Any], None], read: Read) -> None:
    path = tmp_path / "a"
    write(path, table(ROWS * 1000))
    content = path.read_bytes()
    for size in (12, len(content) // 2, len(content) - 9, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path} ")
        assert str(caught.value).endswith("copy it again")
        assert "\n" not in str(caught.value)


def test_a_stream_that_was_not_closed_is_refused(tmp_path: Path) -> None:
    """It ends behind a whole batch, where pyarrow sees nothing wrong."""
    write_stream(tmp_path / "a", table(ROWS * 2000))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-8])
    with pa.OSFile(str(tmp_path / "a")) as file:
        assert pa.ipc.open_stream(file).read_all().num_rows == 4000
    with pytest.raises(CheckpointError, match="lacks the end of an Arrow stream; write it to its end"):
        read_stream(tmp_path / "a")


@KINDS
def test_damage_is_an_error_and_never_a_crash(tmp_path: Path, write: Callable[[Path, Any], None], read: Read) -> None:
    path = tmp_path / "a"
    write(path, table(ROWS * 10))
    content = path.read_bytes()
    choose = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[choose.randrange(8, len(damaged))] ^= choose.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            read(path)
        except CheckpointError as error:
            refused += 1
            assert str(error).startswith(f"{path} ")  # noqa: PT017
    assert refused > 15


@pytest.mark.parametrize("name", ["pyarrow", "pyarrow.parquet"])
def test_without_pyarrow_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CheckpointError) as caught:
        read_parquet(tmp_path / "a.parquet")
    assert str(caught.value) == (
        f"{tmp_path}/a.parquet is a parquet file, which needs pyarrow to be read; run pip install 'qlora-lite[data]'"
    )


def test_zstd_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zst").write_bytes(pa.compress(b"text", "zstd", asbytes=True))
    with open(tmp_path / "a.zst", "rb") as file:
        assert zstd_stream(file, tmp_path / "a.zst").read() == b"text"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with (
        open(tmp_path / "a.zst", "rb") as file,
        pytest.raises(CheckpointError, match=r"is compressed by zstd, which needs pyarrow .*'qlora-lite\[data\]'"),
    ):
        zstd_stream(file, tmp_path / "a.zst")


@KINDS
def test_batches_bound_the_memory(tmp_path: Path, write: Callable[[Path, Any], None], read: Read) -> None:
    """Of one row group or batch of 30 MB, pyarrow and Python hold a part at a time."""
    path = tmp_path / "a"
    texts = [random.Random(row).randbytes(500).hex() for row in range(30_000)]
    if write is write_parquet:
        pq.write_table(pa.table({"text": texts}), path)
    else:
        write(path, pa.table({"text": pa.array(texts)}))
    before, most = pa.total_allocated_bytes(), 0
    records = parquet_records(path) if read is read_parquet else arrow_records(path, stream=read is read_stream)
    tracemalloc.start()
    for text, record in zip(texts, records, strict=True):
        assert record.value == {"text": text}
        most = max(most, pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 12 << 20
    assert peak < 12 << 20
