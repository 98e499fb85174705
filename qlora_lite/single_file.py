"""One file that a person names, written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.places import check_place
from qlora_lite.regular_files import is_regular
from qlora_lite.signals import stoppable, unfinished
from qlora_lite.storage import UNFINISHED


def check_writable(path: str | Path, suffix: str, overwrite: bool) -> None:
    """Raises before any work is done if the file could not be written in the end.

    ConfigError for a name without its suffix; CheckpointError for a folder, a pipe or device, a file that exists and is
    not to be overwritten, and a place where none can be made.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise ConfigError(f"the file must be named *{suffix}; got {path}")
    check_place(path)
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
