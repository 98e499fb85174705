"""Reads files from untrusted sources, and writes files and JSON as a whole.

The lowest file of the room. Only regular files of limited size are opened: reading a pipe may wait forever, and a
device such as /dev/zero never ends.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.signals import deferred_signals, removed_at_end
from qlora_lite.system import opens_folders

# For configs and indexes. The index of a model with a hundred thousand tensors has 10 MB.
LARGEST_JSON = 32 << 20
SHOWN = 60
SIMILAR, CLOSE = 3, 0.7  # how many names are told for one that does not exist, and how near they are (difflib)

CONFIG_FILE = "config.json"
# Companion files of a checkpoint: those of tokenizers and processors, chat templates, and licences.
COMPANION_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".vocab", ".bpe", ".spm", ".codes")
COMPANION_NAMES = re.compile(
    r".+\.model\.v\w+"  # Mistral's tokenizer.model.v3
    r"|(?:[\w-]+[-_.])?(?:vocab|merges|dict)\.txt"
    r"|(?i:(?:[\w-]+[-_.])?(?:licen[cs]e|notice|copying|copyright|use[-_]policy)(?:[-_][\w-]+)?(?:\.(?:txt|md|rst|pdf))?)"
)

# The suffix of files and folders that are not complete, and the form of their names, next to the final one.
UNFINISHED = ".partial"
UNFINISHED_NAME = f".{{}}.12345678{UNFINISHED}"

# Errors of Windows (access denied, sharing violation) about a file that another process has open, and the seconds
# after which it is tried again: scanners open new files for an instant.
OPEN_ELSEWHERE = (5, 32)
RENAME_WAITS = (0.02, 0.05, 0.1, 0.3, 0.6)


def excerpt(value: object) -> str:
    """Returns the repr of a value for an error, cut to 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."


def is_companion_name(name: str) -> bool:
    """Whether a file of this name may belong to a checkpoint without being weights, code or a model card."""
    return not name.startswith(".") and (
        name.endswith(COMPANION_SUFFIXES) or COMPANION_NAMES.fullmatch(name) is not None
    )


def is_regular(path: Path) -> bool:
    """Whether the path is a regular file, or a link to one. False for a name that no file can have."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def has_config(folder: Path) -> bool:
    """Whether a path is the folder of a checkpoint."""
    return is_regular(folder / CONFIG_FILE)


def similar_paths(path: str | Path, suits: Callable[[Path], bool] = os.path.exists) -> list[Path]:
    """Returns the paths that a wrong one probably means, the nearest first: only its names differ, and only a little.

    suits: whether a path is of the kind that is looked for.
    """
    path = Path(path)
    above = [path.parent] if path.parent.is_dir() or path.parent == path else similar_paths(path.parent, os.path.isdir)
    found = []
    for parent in above:
        try:
            names = os.listdir(parent)
        except OSError:  # it may not be read
            continue
        found += [parent / name for name in difflib.get_close_matches(path.name, names, SIMILAR, CLOSE)]
    return [near for near in found if suits(near)]


def did_you_mean(path: str | Path, suits: Callable[[Path], bool] = os.path.exists) -> str:
    """Returns `; did you mean out/run?` for a path that does not exist, an empty text if there is nothing similar."""
    found = similar_paths(path, suits)
    return f"; did you mean {' or '.join(map(str, found))}?" if found else ""


def open_regular(path: Path, what: str, largest: int | None = None) -> BinaryIO:
    """Opens a file for reading.

    Raises CheckpointError if it is missing, not a regular file, or has more than `largest` bytes. what: the kind of
    file that is expected, for the error.
    """
    try:
        state = os.stat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; expected {what}{did_you_mean(path, is_regular)}") from None
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
    """Returns the system's description of an error, without the path."""
    return getattr(error, "strerror", None) or str(error)


def check_writable(path: str | Path, suffix: str, overwrite: bool) -> None:
    """Checks, before any work is done, that a file can be written.

    Raises ConfigError for a name without the suffix; CheckpointError for a folder, a pipe or device, an existing file
    unless `overwrite`, and a path where no file can be created.
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
    """Yields a temporary file that is renamed to `path` at the end of the block, and removed if the block raises.

    Raises the errors of `check_writable`, and CheckpointError if writing fails.
    """
    path = Path(path)
    check_writable(path, path.suffix, overwrite)
    path = Path(os.path.realpath(path))  # a link is followed, not replaced
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with deferred_signals(), removed_at_end(temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            rename(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def check_creatable(path: Path) -> None:
    """Raises CheckpointError if nothing can be created at `path`.

    The reasons are a parent that is a file, a circle of links, a name that is too long, and missing permission.
    """
    path = path.absolute()
    for name in (path, path.with_name(UNFINISHED_NAME.format(path.name)) if path.name else path):
        if problem := _name_problem(name):
            raise CheckpointError(f"{path} cannot be written: {problem}")
    path = Path(os.path.realpath(path))  # a link is followed, whether or not its target exists
    existing = (parent for parent in path.parents if parent.exists())  # none for a drive that is missing
    place = next(existing, path.parent) if path.name else path
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path} cannot be written: {place} is not a folder that may be written to")


def _name_problem(path: Path) -> str | None:
    """The reason why the system rejects a name, whether or not a file of that name exists; None if it accepts it."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return reason(error)
    return None


def sync(path: Path) -> None:
    """Flushes a file of this process, or the names in a folder, to the disk; of a folder where the system opens one."""
    is_folder = path.is_dir()
    if is_folder and not opens_folders():
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows flushes no file opened for reading
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder, replacing a file of the name. On Windows, waits a second for others to close it."""
    for seconds in RENAME_WAITS:
        try:
            os.replace(source, target)
            return
        except PermissionError as error:
            if getattr(error, "winerror", None) not in OPEN_ELSEWHERE:
                raise
        time.sleep(seconds)
    os.replace(source, target)


def write_json(path: Path, value: object, sort_keys: bool = True) -> None:
    """Writes indented JSON, the same bytes on every system, and flushes it to the disk."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        json.dump(value, file, indent=2, sort_keys=sort_keys)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError if the file is missing, unreadable, or holds something else."""
    try:
        with open_regular(path, "a JSON file", LARGEST_JSON) as file:
            value = json.loads(file.read().decode("utf-8"))
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: bad JSON, bad UTF-8, numbers with too many digits
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object; got a {type(value).__name__}")
    return value
