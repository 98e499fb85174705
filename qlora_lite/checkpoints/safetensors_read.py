"""Reads the tensors of a safetensors checkpoint, whole or a few rows at a time.

Bytes are read into memory of ours (pread(2)) instead of mapped: pages of a mapped file count as resident until the
kernel takes them back, so that a process which only passes through a checkpoint would grow to its size. The safetensors
package checks each file first (sizes, overlaps, the header), without touching its tensors.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_lite.checkpoints.files import LARGEST_JSON, excerpt, is_regular, open_regular, read_json
from qlora_lite.checkpoints.safetensors_write import INDEX_FILE, SAFETENSORS_DTYPES, SINGLE_FILE
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.signals import poll

DTYPE_OF = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
HEADER_LENGTH_BYTES = 8
METADATA = "__metadata__"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its bytes begin, and what they are. Reading it leaves nothing open.

    state: of the file when that was found out (`_state`); in one that has changed since, other bytes may lie there.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    state: tuple[int, int]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The whole tensor."""
        return self.rows(0, self.shape[0] if self.shape else 1)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, along the first dimension; all of a tensor that has no dimensions."""
        if not self.shape:
            return self._read(self.begin, ())
        return self._read(self.begin + start * self.row_bytes, (stop - start, *self.shape[1:]))

    def select(self, index: int) -> StoredTensor:
        """What lies at this index of the first dimension."""
        begin = self.begin + index * self.row_bytes
        return replace(self, name=f"{self.name}[{index}]", shape=self.shape[1:], begin=begin)

    def _read(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        poll()
        tensor = torch.empty(shape, dtype=self.dtype)
        left = tensor.view(-1).view(torch.uint8).numpy().data
        try:
            with open(self.path, "rb", buffering=0) as file:
                if _state(os.fstat(file.fileno())) != self.state:
                    raise CheckpointError(f"{self.path} was changed while it was in use; start again")
                while left:
                    got = os.preadv(file.fileno(), [left], offset)
                    if got == 0:
                        raise CheckpointError(f"{self.path} ends inside {self.name}")
                    left, offset = left[got:], offset + got
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return tensor


def _state(file: os.stat_result) -> tuple[int, int]:
    """What changes when a file is written to or replaced: its size, and when it was written (ns)."""
    return file.st_size, file.st_mtime_ns


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """safetensors' own reader of a file; CheckpointError for a file that is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error


def _named_once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; readers differ in which of two values of one name they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise CheckpointError(f"{path} has {excerpt(twice)} twice in its header")
    return found


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, in the order of their bytes. CheckpointError for a file that is not sound."""
    with open_regular(path, "a safetensors file") as file:
        state = _state(os.fstat(file.fileno()))
        length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        if length > LARGEST_JSON:
            raise CheckpointError(
                f"{path} is no readable safetensors file: its header is said to have {length:,} bytes, of which at "
                f"most {LARGEST_JSON:,} are read"
            )
        with _opened(path):
            pass
        header: dict[str, Any] = json.loads(file.read(length), object_pairs_hook=functools.partial(_named_once, path))
    header.pop(METADATA, None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - DTYPE_OF.keys())
    if unknown:
        raise CheckpointError(f"{path} has tensors of {', '.join(unknown)}; known are {', '.join(DTYPE_OF)}")
    start = HEADER_LENGTH_BYTES + length
    found = [
        StoredTensor(
            path, name, DTYPE_OF[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0], state
        )
        for name, entry in header.items()
    ]
    return {tensor.name: tensor for tensor in sorted(found, key=lambda tensor: tensor.begin)}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file. CheckpointError when it is missing or no safetensors file."""
    return {name: stored.read() for name, stored in stored_tensors(path).items()}


class TensorFiles:
    """The tensors of a checkpoint folder by name, in the order of the files; each is read when asked for.

    Reads the single `model.safetensors`, or `model.safetensors.index.json` and the shards it names; the first where
    both are there, as transformers does. Every file must be a plain `.safetensors` name inside the folder. Raises
    CheckpointError for anything else, before reading.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / SINGLE_FILE).is_file():
            self.stored = stored_tensors(folder / SINGLE_FILE)
        elif (folder / INDEX_FILE).is_file():
            self.stored = self._by_index()
        else:
            raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")

    @classmethod
    def of(cls, folder: Path | None) -> TensorFiles | None:
        """Those of a folder; None without a folder, and for one that holds no safetensors."""
        there = folder is not None and any((folder / name).is_file() for name in (INDEX_FILE, SINGLE_FILE))
        return cls(folder) if there and folder is not None else None

    def _by_index(self) -> dict[str, StoredTensor]:
        listed = read_json(self.folder / INDEX_FILE).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise CheckpointError(f"{self.folder / INDEX_FILE} has no weight_map")
        paths = {file: self._checked(file) for file in dict.fromkeys(map(str, listed.values()))}
        stored: dict[str, StoredTensor] = {}
        for file, path in paths.items():
            found = stored_tensors(path)
            wanted = {name for name, where in listed.items() if where == file}
            if lost := sorted(wanted - found.keys()):
                raise CheckpointError(f"{path} should hold {listing(lost)} by the index but does not")
            stored |= {name: tensor for name, tensor in found.items() if name in wanted}
        return stored

    def _checked(self, file: str) -> Path:
        if file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{self.folder / INDEX_FILE} names {excerpt(file)}, which is no plain .safetensors file name"
            )
        path = self.folder / file
        if not is_regular(path):
            raise CheckpointError(f"{self.folder / INDEX_FILE} names {excerpt(file)}, which is no file in its folder")
        return path

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, file by file, one in memory at a time."""
        for name, stored in self.stored.items():
            yield name, stored.read()
