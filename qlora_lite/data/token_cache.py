"""Tokens of a source on disk, next to the data, so that a second start reads them instead of making them.

The folder `.<name>.tokens/<key>/` holds the arrays of `token_arrays` and `index.json`. The key is a SHA-256 of all that
decides on the tokens: the data's content, the tokenizer with its chat template, the settings, and this room's code. A
folder is written as a whole, so two runs that make the same one at once do not disturb each other. Its files are
compared with their sums before they are used; damaged ones are made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from qlora_lite.checkpoints.atomic_folder import new_folder
from qlora_lite.checkpoints.files import UNFINISHED, check_creatable, read_json, reason, write_json
from qlora_lite.data.encoding import Tokenizer
from qlora_lite.data.sources.source import Source, files_of, fingerprint
from qlora_lite.data.token_arrays import (
    COLUMNS,
    HEADER_BYTES,
    TokenArrays,
    TokenWriter,
    column_path,
    mapped,
)
from qlora_lite.errors import CheckpointError
from qlora_lite.system import user_cache

INDEX_FILE = "index.json"
# Folders of one source that are kept: other tokenizers and settings, and data that has changed since.
KEPT_FOLDERS = 4
CHUNK_BYTES = 1 << 20


def cache_folder(source: Source) -> Path:
    """Returns the folder for the tokens of a source: next to the data if that can be written, else in `user_cache`."""
    if files_of(source):
        path = Path(os.path.realpath(source.location))
        own = _file_name(path.name)
        beside = path.parent / f".{own}.tokens"
        try:
            check_creatable(beside / "key")
        except CheckpointError:
            name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
            return user_cache() / "tokens" / f"{own}-{name}"
        return beside
    return user_cache() / "tokens" / _file_name(source.location)


def _file_name(location: str) -> str:
    """A name for files, also on Windows, where a colon would name a second stream of the file before it."""
    return location.replace("/", "--").replace(":", "--")


def cache_key(source: Source, tokenizer: Tokenizer, settings: Mapping[str, object]) -> str | None:
    """Returns the key of the tokens of a source; None for a tokenizer whose content cannot be compared."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or backend is None:
        return None
    special = {name: str(value) for name, value in getattr(tokenizer, "special_tokens_map", {}).items()}
    parts = [
        fingerprint(source),
        hashlib.sha256(backend.to_str().encode()).hexdigest(),
        type(tokenizer).__name__,
        json.dumps([special, tokenizer.chat_template, dict(settings)], sort_keys=True, default=str),
        _code_digest(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@cache
def _code_digest() -> str:
    """The sources of this room: an edited rule for what is learned must not find tokens of the old one."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def load_tokens(folder: Path) -> tuple[TokenArrays, dict[str, Any]] | None:
    """Returns the arrays of a folder and what `save_tokens` noted beside them; None if it is missing or damaged."""
    try:
        index = read_json(folder / INDEX_FILE)
        counts, digests, noted = index["counts"], index["sha256"], index["noted"]
        for name in COLUMNS:
            if _sha256(column_path(folder, name)) != digests[name]:
                return None
        arrays = _mapped(folder, counts)
    except (CheckpointError, OSError, KeyError, TypeError):
        return None
    os.utime(folder)  # the folders used last are kept
    return arrays, dict(noted)


def _mapped(folder: Path, counts: Mapping[str, int]) -> TokenArrays:
    columns = {name: mapped(column_path(folder, name), name, counts[name]) for name in COLUMNS}
    return TokenArrays(**columns, images={})


def save_tokens(
    folder: Path, fill: Callable[[TokenWriter], dict[str, object]]
) -> tuple[TokenArrays, dict[str, object]]:
    """Writes a folder of tokens as a whole. fill: appends the examples, and returns what to note beside them.

    Raises the errors of `fill`, and CheckpointError if the folder cannot be written. Then nothing is left behind.
    """
    is_first = not folder.parent.exists()
    try:
        return _saved(folder, fill)
    finally:
        if is_first:
            with suppress(OSError):  # the new folder is in it
                folder.parent.rmdir()


def _saved(folder: Path, fill: Callable[[TokenWriter], dict[str, object]]) -> tuple[TokenArrays, dict[str, object]]:
    try:
        with new_folder(folder, overwrite=True) as temporary:
            counts, noted = _fill(temporary, fill)
    except CheckpointError:
        # Windows replaces no folder that another run has mapped. The key says that it holds the same.
        if (loaded := load_tokens(folder)) is None:
            raise
        return loaded
    try:
        arrays = _mapped(folder, counts)
    except OSError as error:
        raise CheckpointError(f"{folder} was replaced by another run ({reason(error)}); start again") from error
    _remove_old(folder.parent)
    return arrays, noted


def _fill(folder: Path, fill: Callable[[TokenWriter], dict[str, object]]) -> tuple[dict[str, int], dict[str, object]]:
    """Writes the files of a folder. Nothing stays mapped, because Windows renames no folder with an open file."""
    writer = TokenWriter(folder)
    try:
        noted = fill(writer)
        arrays, digests = writer.finish()
    finally:
        writer.close()
    counts = {name: len(getattr(arrays, name)) for name in COLUMNS}
    write_json(folder / INDEX_FILE, {"counts": counts, "sha256": digests, "noted": noted})
    return counts, noted


def _remove_old(folder: Path) -> None:
    """Removes all but the folders used last. A process that has one mapped keeps its mapping, on Windows the folder."""
    stands = [path for path in folder.iterdir() if path.is_dir() and (path / INDEX_FILE).is_file()]
    for old in sorted(stands, key=lambda path: path.stat().st_mtime)[:-KEPT_FOLDERS]:
        gone = old.with_name(f".{old.name}.gone{UNFINISHED}")
        with suppress(OSError):  # one that is in use on Windows, or that another run removes
            os.replace(old, gone)
            shutil.rmtree(gone, ignore_errors=True)
