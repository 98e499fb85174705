"""Records of parquet and Arrow files, and streams in zstd: all that pyarrow reads.

Only this file imports pyarrow, when a file needs it. Tables are read a batch of rows at a time. Their values become
Python's: structs and maps are dicts, and dates, bytes and decimals, which JSON does not have, stay what they are.
"""

from __future__ import annotations

import importlib
import json
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qlora_lite.checkpoints.files import open_regular
from qlora_lite.data.sources.raw import RawRecord
from qlora_lite.errors import CheckpointError, QLoRAError, listing

# Rows that are read at a time: fewer if they are large.
ROWS = 1000
BATCH_BYTES = 8 << 20
BUFFER = 1 << 20
# What every writer puts behind the last batch of a stream. pyarrow does not miss it.
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def _pyarrow(module: str, path: Path, kind: str) -> Any:
    try:
        importlib.import_module("pyarrow")
        return importlib.import_module(module)
    except ImportError as error:
        needed = f"{path} is {kind}, which needs pyarrow to be read"
        raise CheckpointError(f"{needed}; run pip install 'qlora-lite[data]'") from error


def zstd_stream(file: BinaryIO, path: Path) -> Any:
    """Returns the decompressed content of an open zstd file, which raises OSError where the file is damaged."""
    arrow = _pyarrow("pyarrow", path, "compressed by zstd")
    return arrow.CompressedInputStream(arrow.PythonFile(file, mode="r"), "zstd")


def parquet_records(path: Path) -> Iterator[RawRecord]:
    """Yields the rows of a parquet file. Raises CheckpointError if the file is damaged."""
    parquet = _pyarrow("pyarrow.parquet", path, "a parquet file")
    with open_regular(path, "a parquet file") as file, _errors_of_pyarrow(path, "parquet"):
        # Without a buffer, or with all of them filled ahead, a whole row group would be held in memory.
        table = parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True)
        groups = [table.metadata.row_group(index) for index in range(table.metadata.num_row_groups)]
        rows = min((_rows_at_once(group.total_byte_size, group.num_rows) for group in groups), default=ROWS)
        yield from row_records(table.iter_batches(batch_size=rows, use_threads=False), str(path))


def _rows_at_once(size: int, rows: int) -> int:
    """How many rows have about BATCH_BYTES, by the bytes of them all."""
    return max(1, min(ROWS, rows * BATCH_BYTES // max(1, size)))


def arrow_records(path: Path, stream: bool) -> Iterator[RawRecord]:
    """Yields the rows of an Arrow file. Raises CheckpointError if the file is damaged.

    stream: whether the file has Arrow's stream format, as `datasets` writes, or else its file format.
    """
    ipc, arrow = _pyarrow("pyarrow.ipc", path, "an Arrow file"), _pyarrow("pyarrow", path, "an Arrow file")
    with open_regular(path, "an Arrow file") as file, _errors_of_pyarrow(path, "Arrow"):
        # Mapped, since a batch may be as large as the file.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if stream and mapped[-len(END_OF_STREAM) :] != END_OF_STREAM:
            raise CheckpointError(f"{path} lacks the end of an Arrow stream; write it to its end, or copy it again")
        yield from row_records(_checked_batches(ipc, arrow.py_buffer(mapped), stream), str(path))


def _checked_batches(ipc: Any, content: Any, stream: bool) -> Iterator[Any]:
    """Yields batches whose offsets and lengths were checked. Those of a damaged file point anywhere in memory."""
    reader = ipc.open_stream(content) if stream else ipc.open_file(content)
    batches = reader if stream else map(reader.get_batch, range(reader.num_record_batches))
    for batch in batches:
        batch.validate(full=True)
        yield batch


@contextmanager
def _errors_of_pyarrow(path: Path, kind: str) -> Iterator[None]:
    """Turns any exception, as pyarrow raises for damaged files, into a CheckpointError with its first line.

    MemoryError is one of them: a damaged file may ask for any amount.
    """
    try:
        yield
    except QLoRAError:
        raise
    except Exception as error:
        why = f"cannot be read as {kind}: {_first_line(error)}"
        raise CheckpointError(f"{path} {why}; the file is damaged or incomplete: copy it again") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def row_records(tables: Iterable[Any], name: str) -> Iterator[RawRecord]:
    """Yields the rows of record batches or tables. name: the file's or data set's, for the places of the records.

    Raises CheckpointError if two columns have one name.
    """
    row = 0
    for table in tables:
        names = table.schema.names
        if twice := sorted({column for column in names if names.count(column) > 1}):
            raise CheckpointError(f"{name} has several columns named {listing(twice)}; rename them")
        step = _rows_at_once(table.nbytes, table.num_rows)
        for start in range(0, table.num_rows, step):
            for value, error in _rows(table.slice(start, step)):
                row += 1
                yield RawRecord(f"{name}, row {row}", value, error)


def _rows(table: Any) -> Iterator[tuple[dict[str, object] | None, str | None]]:
    """Yields each row's values, or why Python does not have them: a date before year 1, a map with a key twice, ..."""
    try:
        values = _values(table)
    except Exception as error:
        if table.num_rows == 1:
            yield None, f"a value that Python does not have ({_first_line(error)}); change it, or leave the row out"
            return
        for row in range(table.num_rows):
            yield from _rows(table.slice(row, 1))
    else:
        yield from ((value, None) for value in values)


def _values(table: Any) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = table.to_pylist(maps_as_pydicts="strict")
    for field in table.schema:
        if _holds_json(field.type):
            for row in rows:
                row[field.name] = _parsed(row[field.name], field.type)
    return rows


def _is_json(kind: Any) -> bool:
    """Whether values of the type are JSON text. So `datasets` stores columns of mixed types."""
    return getattr(kind, "extension_name", None) == "arrow.json"


def _fields(kind: Any) -> list[Any]:
    return [kind.field(index) for index in range(kind.num_fields)]


def _holds_json(kind: Any) -> bool:
    return _is_json(kind) or any(_holds_json(field.type) for field in _fields(kind))


def _parsed(value: Any, kind: Any) -> Any:
    """A value of an Arrow type, the JSON text in it parsed."""
    if value is None or not _holds_json(kind):
        return value
    if _is_json(kind):
        return json.loads(value)
    if isinstance(value, list):
        return [_parsed(part, kind.field(0).type) for part in value]
    if hasattr(kind, "item_type"):  # a map
        return {key: _parsed(part, kind.item_type) for key, part in value.items()}
    return {field.name: _parsed(value[field.name], field.type) for field in _fields(kind)}
