"""Opening what strangers made: regular files only, and no larger than what they are can be.

A pipe would be waited for without end, and a device such as /dev/zero never ends.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.signals import stoppable, unfinished

# Configurations and indexes: the index of a model of a hundred thousand tensors has 10 MB.
LARGEST_JSON = 32 << 20
SHOWN = 60

UNFINISHED = ".partial"
# What is unfinished stands beside its place under a name that is longer by so much.
UNFINISHED_NAME = f".{{}}.12345678{UNFINISHED}"


def excerpt(value: object) -> str:
    """A value as an error shows it: its repr, cut to 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."


def is_regular(path: Path) -> bool:
    """Whether there is a regular file, or a link to one; False too for a name that no file can have."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def open_regular(path: Path, what: str, largest: int | None = None) -> BinaryIO:
    """The file, opened for reading. CheckpointError if it is missing, is no regular file, or is larger than `largest`.

    what: the kind of file that is expected, for the error.
    """
    try:
        state = os.stat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; expected {what}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {excerpt(str(path))}: {reason(error)}; expected {what}") from error
    if not stat.S_ISREG(state.st_mode):
        kind = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe, socket or device"
        raise CheckpointError(f"{path} is {kind}; expected {what}")
    if largest is not None and state.st_size > largest:
        raise CheckpointError(f"{path} has {state.st_size:,} bytes; expected {what}, of at most {largest:,}")
    try:
        return open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}; expected {what}") from error


def reason(error: Exception) -> str:
    """What the system says was wrong, without the path."""
    return getattr(error, "strerror", None) or str(error)


def check_writable(path: str | Path, suffix: str, overwrite: bool) -> None:
    """Raises before any work is done if the file could not be written in the end.

    ConfigError for a name without its suffix; CheckpointError for a folder, a pipe or device, a file that exists and is
    not to be overwritten, and a place where none can be made.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise ConfigError(f"the file must be named *{suffix}; got {path}")
    check_creatable(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name a file")
    if path.exists() and not is_regular(path):
        raise CheckpointError(f"{path} is a pipe, socket or device, which would be replaced; name a file")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists; name another file, or ask for overwrite")


@contextmanager
def new_file(path: str | Path, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file beside `path` that becomes it when the block ends well, and disappears when it does not.

    Raises as `check_writable` does, and CheckpointError if writing fails.
    """
    path = Path(path)
    check_writable(path, path.suffix, overwrite)
    path = Path(os.path.realpath(path))  # behind a link stands the file that is meant
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with stoppable(), unfinished(temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def check_creatable(path: Path) -> None:
    """CheckpointError where nothing can be made: behind a file, in a circle of links, under too long a name.

    Also where this user may not write.
    """
    path = path.absolute()
    for name in (path, path.with_name(UNFINISHED_NAME.format(path.name)) if path.name else path):
        if why_not := _wrong_with(name):
            raise CheckpointError(f"{path} cannot be written: {why_not}")
    path = Path(os.path.realpath(path))  # behind a link stands what is meant, there already or not
    place = next(parent for parent in path.parents if parent.exists()) if path.name else path
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path} cannot be written: {place} is no folder that may be written to")


def _wrong_with(path: Path) -> str | None:
    """What the system has against a name, whether or not there is something of that name."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return reason(error)
    return None


def sync(path: Path) -> None:
    """Has a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON and syncs it to disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk. CheckpointError when the file is missing, unreadable, or holds something else."""
    try:
        with open_regular(path, "a JSON file", LARGEST_JSON) as file:
            value = json.loads(file.read().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8 and numbers of too many digits, too
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object; got a {type(value).__name__}")
    return value
