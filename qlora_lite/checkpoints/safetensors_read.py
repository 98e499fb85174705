"""Reads the tensors of a safetensors checkpoint, whole or a few rows at a time.

The first step of a weight on its way in: `StoredTensor` is the `LazyTensor` (lazy_tensors.py) that lies in a file.

Bytes are read, not mapped: pages of a mapped file count as resident memory until the kernel reclaims
them, so a process that reads through a checkpoint would grow to its size. The safetensors package checks each file
first (sizes, overlaps, the header), without reading its tensors.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from qlora_lite.checkpoints.files import LARGEST_JSON, excerpt, is_regular, open_regular, read_json
from qlora_lite.checkpoints.safetensors_write import INDEX_FILE, SAFETENSORS_DTYPES, SINGLE_FILE
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.signals import check_signals

DTYPE_OF = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
HEADER_LENGTH_BYTES = 8
METADATA = "__metadata__"
PICKLES = (".bin", ".pt", ".pth")


class _HeaderEntry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. Each read opens and closes the file.

    begin: offset of its first byte. state: size and modification time of the file when its header was read; a file
    that has changed since is refused, because other bytes may lie at this offset.
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
        """Reads the whole tensor."""
        return self.rows(0, self.shape[0] if self.shape else 1)

    def rows(self, start: int, stop: int) -> Tensor:
        """Reads rows `start` to `stop` of the first dimension; the whole tensor if it has no dimensions."""
        if not self.shape:
            return self._read(self.begin, ())
        return self._read(self.begin + start * self.row_bytes, (stop - start, *self.shape[1:]))

    def select(self, index: int) -> StoredTensor:
        """Returns the tensor at this index of the first dimension, without reading it."""
        begin = self.begin + index * self.row_bytes
        return replace(self, name=f"{self.name}[{index}]", shape=self.shape[1:], begin=begin)

    def read_bytes(self, start: int, stop: int) -> Tensor:
        """Reads bytes `start` to `stop`, as uint8."""
        count = math.prod(self.shape) * self.dtype.itemsize
        return replace(self, dtype=torch.uint8, shape=(count,)).rows(start, stop)

    def _read(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        check_signals()
        tensor = torch.empty(shape, dtype=self.dtype)
        unfilled = tensor.view(-1).view(torch.uint8).numpy().data
        try:
            with open(self.path, "rb", buffering=0) as file:
                if _state(os.fstat(file.fileno())) != self.state:
                    raise CheckpointError(f"{self.path} was changed while it was in use; start again")
                file.seek(offset)
                while unfilled:
                    got = file.readinto(unfilled)
                    if not got:
                        raise CheckpointError(f"{self.path} ends inside {self.name}")
                    unfilled = unfilled[got:]
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return tensor


def _state(file: os.stat_result) -> tuple[int, int]:
    """Returns size and modification time (ns), which change when a file is written to or replaced."""
    return file.st_size, file.st_mtime_ns


def _check_format(path: Path) -> None:
    """Raises CheckpointError unless the safetensors package accepts the file. Reads no tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _without_duplicates(path: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Returns a JSON object. Raises CheckpointError for a repeated key, of which readers take different values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise CheckpointError(f"{path} has {excerpt(twice)} twice in its header")
    return found


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file by name, in the order of their bytes, without reading them.

    Raises CheckpointError if the file is missing, damaged, or has a dtype that torch does not have.
    """
    with open_regular(path, "a safetensors file") as file:
        state = _state(os.fstat(file.fileno()))
        length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        if length > LARGEST_JSON:
            raise CheckpointError(
                f"{path} is not a readable safetensors file: its header claims {length:,} bytes; at most "
                f"{LARGEST_JSON:,} are read"
            )
        _check_format(path)
        check_keys = functools.partial(_without_duplicates, path)
        header: dict[str, _HeaderEntry] = json.loads(file.read(length), object_pairs_hook=check_keys)
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
    """Reads all tensors of one file. Raises CheckpointError if it is missing or not a safetensors file."""
    return {name: stored.read() for name, stored in stored_tensors(path).items()}


def conversion_remedy(source: str) -> str:
    """Returns what to do about a checkpoint whose weights are pickles. source: its folder, or its id on the hub."""
    return (
        f"pickles can run code and are not read; if you trust them, convert them once with "
        f"AutoModelForCausalLM.from_pretrained({source!r}).save_pretrained('converted') of transformers, or fetch "
        f"the revision of the hub that has safetensors (often refs/pr/1)"
    )


def _remedy(folder: Path) -> str:
    """Returns what to do about a folder whose weights are pickles, empty for any other."""
    pickles = sorted(path.name for end in PICKLES for path in folder.glob(f"*{end}"))
    return f"; {listing(pickles, 2)}: {conversion_remedy(str(folder))}" if pickles else ""


class TensorFiles:
    """The tensors of a checkpoint folder by name, in the order of the files; `stored` holds them unread.

    The folder has a single `model.safetensors`, or `model.safetensors.index.json` and the shards that it names. The
    single file is taken if both exist, as in transformers. Raises CheckpointError if neither exists, if the index names
    anything but `.safetensors` files inside the folder, or if a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / SINGLE_FILE).is_file():
            self.stored = stored_tensors(folder / SINGLE_FILE)
        elif (folder / INDEX_FILE).is_file():
            self.stored = self._by_index()
        else:
            raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{_remedy(folder)}")

    @classmethod
    def of(cls, folder: Path | None) -> TensorFiles | None:
        """The tensors of a folder; None for no folder, or for one without safetensors files."""
        if folder is None or not any((folder / name).is_file() for name in (INDEX_FILE, SINGLE_FILE)):
            return None
        return cls(folder)

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
                f"{self.folder / INDEX_FILE} names {excerpt(file)}, which is not a plain .safetensors file name"
            )
        path = self.folder / file
        if not is_regular(path):
            raise CheckpointError(
                f"{self.folder / INDEX_FILE} names {excerpt(file)}, which is not a file in its folder"
            )
        return path

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Reads and yields each tensor with its name, file by file."""
        for name, stored in self.stored.items():
            yield name, stored.read()
