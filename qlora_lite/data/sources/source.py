"""A source of records, as the user names it: a file, a folder, or a data set of the hub."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_lite.checkpoints.files import did_you_mean, excerpt, open_regular, reason
from qlora_lite.data.sources.compression import EXPECTED
from qlora_lite.data.sources.data_file import file_records, text_suffix
from qlora_lite.data.sources.folder import DATA_SUFFIXES, data_files
from qlora_lite.data.sources.hub_dataset import HubDataset, hub_fingerprint, hub_records, parse_hub_dataset
from qlora_lite.data.sources.raw import RawRecord
from qlora_lite.errors import CheckpointError, ConfigError

CHUNK = 1 << 20
# Error of Windows about a name that no file can have.
INVALID_NAME = 123


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
    """Returns the files that a source reads, in reading order; none for a data set of the hub.

    A folder gives the data files in it, and `folder:split` those of a split. Raises CheckpointError if there are none.
    """
    return [path for _, path in _named_files(source)]


def _named_files(source: Source) -> list[tuple[str, Path]]:
    """The files of a source with their names: their paths from the folder that was named."""
    path = Path(source.location)
    if os.path.isdir(path):
        return [(found.relative_to(path).as_posix(), found) for found in data_files(path)]
    if _exists(path):
        return [(path.name, path)]
    before, colon, split = source.location.rpartition(":")
    if colon and not set(split) & set("/\\") and os.path.isdir(before):  # C:\data.jsonl has no split
        return [(found.relative_to(before).as_posix(), found) for found in data_files(Path(before), split)]
    if _hub_dataset(source) is None:
        wanted = "name a file, a folder, or a data set of the hub with its split, as org/name:train"
        raise CheckpointError(f"{source.location} does not exist; {wanted}{did_you_mean(path)}")
    return []


def _exists(path: Path) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        if getattr(error, "winerror", None) == INVALID_NAME:  # name:config:split
            return False
        raise CheckpointError(f"cannot read {excerpt(str(path))}: {reason(error)}") from error
    return True


def _hub_dataset(source: Source) -> HubDataset | None:
    """The data set of the hub that a location without a file means, if it has the form of one."""
    named = parse_hub_dataset(source.location)
    is_file_name = named is not None and text_suffix(Path(named.name)) in DATA_SUFFIXES
    return None if is_file_name else named


def fingerprint(source: Source) -> str:
    """Returns the SHA-256 of the source's content in hexadecimal.

    It is over the names and the bytes of all files, where the path of a folder does not count, or over the rows of a
    data set of the hub. Raises CheckpointError if the content cannot be read.
    """
    files = _named_files(source)
    named = _hub_dataset(source)
    if not files and named is not None:
        return hub_fingerprint(named)
    whole = hashlib.sha256()
    for name, path in files:
        whole.update(os.fsencode(name) + b"\0" + _digest(path))
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

    Raises CheckpointError for a file or data set that cannot be read.
    """
    files = files_of(source)
    named = _hub_dataset(source)
    if not files and named is not None:
        yield from hub_records(named)
    for path in files:
        yield from file_records(path)
