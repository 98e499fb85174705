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

    Also for a link to nothing, and for a place where this user may not write.
    """
    path = path.absolute()
    for name in (path, path.with_name(BESIDE.format(path.name)) if path.name else path):
        try:
            os.stat(name)
        except (FileNotFoundError, NotADirectoryError):
            pass  # as it should be: the place above it is looked at below
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be written: {reason(error)}") from error
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to nothing; name what it should lead to, or another place")
    place = next(parent for parent in path.parents if parent.exists()) if path.name else path
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path} cannot be written: {place} is no folder that may be written to")
