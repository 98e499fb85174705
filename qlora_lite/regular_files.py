"""Opening what strangers made: regular files only, and no larger than what they are can be.

A pipe would be waited for without end, and a device such as /dev/zero never ends.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from qlora_lite.errors import CheckpointError

# Configurations and indexes: the index of a model of a hundred thousand tensors has 10 MB.
LARGEST_JSON = 32 << 20
SHOWN = 60


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
