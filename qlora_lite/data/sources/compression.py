"""Opens a data file for reading, and decompresses gzip and zstd on the way. The first bytes tell, not the name."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qlora_lite.checkpoints.files import open_regular, reason
from qlora_lite.data.sources.arrow_tables import zstd_stream
from qlora_lite.errors import CheckpointError

EXPECTED = "a data file"
BUFFER = 1 << 20
GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
# A zstd file may begin with a frame that readers skip: sixteen numbers from 0x184D2A50, little-endian.
ZSTD_SKIPPED = b"\x2a\x4d\x18"


def compression_of(head: bytes) -> str | None:
    """Returns "gzip" or "zstd" by the first bytes of a file, None if it is not compressed by one of them."""
    if head.startswith(GZIP):
        return "gzip"
    skipped = head[:1] in (bytes([first]) for first in range(0x50, 0x60)) and head[1:4] == ZSTD_SKIPPED
    return "zstd" if skipped or head.startswith(ZSTD) else None


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Yields the decompressed content of a regular file.

    Raises CheckpointError if the file cannot be opened, and while it is read if it is damaged. No more than a buffer
    is decompressed at a time.
    """
    with open_regular(path, EXPECTED) as file, closing(_Checked(file, path)) as plain:
        compression = compression_of(plain.read(4))
        file.seek(0)
        if compression is None:
            yield io.BufferedReader(plain, BUFFER)
            return
        stream: Any = gzip.GzipFile(fileobj=file) if compression == "gzip" else zstd_stream(file, path)
        with closing(_Checked(stream, path, compression)) as decompressed:
            yield io.BufferedReader(decompressed, BUFFER)


class _Checked(io.RawIOBase):
    """A stream whose errors name the file."""

    def __init__(self, stream: Any, path: Path, compression: str | None = None) -> None:
        self._stream, self._path, self._compression = stream, path, compression

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._stream.readinto(buffer))
        except (OSError, EOFError, zlib.error) as error:
            if self._compression is None:
                raise CheckpointError(f"{self._path} cannot be read: {reason(error)}") from error
            why = f"cannot be decompressed: {reason(error)}"
            wanted = f"the {self._compression} file is damaged or incomplete; copy it again"
            raise CheckpointError(f"{self._path} {why}; {wanted}") from error
