"""Whether something could be written under a name, found out before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from qlora_lite.errors import CheckpointError
from qlora_lite.regular_files import reason
from qlora_lite.storage import UNFINISHED

# What is unfinished stands beside its place under a name that is longer by so much.
BESIDE = f".{{}}.12345678{UNFINISHED}"


def check_place(path: Path) -> None:
    """CheckpointError where nothing can be made: behind a file, in a circle of links, under too long a name.

    Also where this user may not write.
    """
    path = path.absolute()
    for name in (path, path.with_name(BESIDE.format(path.name)) if path.name else path):
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
