"""A source of records, as the user names it: a file, a folder, or a data set of the hub."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_lite.checkpoints.files import excerpt, open_regular, reason
from qlora_lite.data.sources.json_lines import json_lines
from qlora_lite.data.sources.raw import RawRecord
from qlora_lite.errors import CheckpointError, ConfigError

EXPECTED = "a data file"
CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """Where records come from: as the user named it, e.g. "chats.jsonl", "folder/", "org/name:train".

    weight: the share of this source in a mixture, relative to the others; None if none was named.
    """

    location: str
    weight: float | None = None


def parse_source(text: str) -> Source:
    """Returns the source that `location` or `location=weight` names. A path that exists may hold `=`.

    Raises ConfigError for a weight that is not a finite number above 0.
    """
    location, equals, weight = text.rpartition("=")
    if not equals or os.path.exists(text):
        location, weight = text, ""
    if not location:
        raise ConfigError(f"a source of data needs a path or a name, as in chats.jsonl=0.7; got {excerpt(text)}")
    if location == text:
        return Source(text)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        wanted = "behind the last = of a source stands its weight, a finite number above 0"
        raise ConfigError(f"{wanted}; got {excerpt(weight)} in {excerpt(text)}, which is not an existing path either")
    return Source(location, value)


def files_of(source: Source) -> list[Path]:
    """Returns the files that a source reads, in reading order."""
    return [Path(source.location)]


def fingerprint(source: Source) -> str:
    """Returns the SHA-256 of the source's content in hexadecimal: of the names and the bytes of its files."""
    whole = hashlib.sha256()
    for path in files_of(source):
        whole.update(os.fsencode(path.name) + b"\0" + _digest(path))
    return whole.hexdigest()


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open_regular(path, EXPECTED) as file:
        try:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    return digest.digest()


def raw_records(source: Source) -> Iterator[RawRecord]:
    """Yields the records of a source as they are, those that cannot be read with the reason.

    Raises CheckpointError for a file that cannot be read.
    """
    for path in files_of(source):
        with open_regular(path, EXPECTED) as file:
            yield from json_lines(file, str(path))
