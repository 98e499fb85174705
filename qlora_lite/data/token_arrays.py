"""Tokenized examples in flat arrays: four bytes a token, in memory or in files that are mapped.

A token that is learned is stored as its id t, another one as ~t = -t - 1. Beside the tokens, each example has its
length, the position of its first learned token, the number of its learned tokens, the number of its record, and a
digest of the record's tokens, by which equal records are found. On disk each array is one safetensors file.
"""

from __future__ import annotations

import array
import hashlib
import json
import operator
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from qlora_lite.checkpoints.files import sync
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.encoding import Marked, TokenizedExample
from qlora_lite.data.images.image import KeptImage
from qlora_lite.errors import CheckpointError

HEADER_BYTES = 128
BUFFER_BYTES = 1 << 20
NEVER = 2**31 - 1  # the first learned token of an example without one
COLUMNS = {"tokens": "i", "lengths": "i", "first_learned": "i", "learned": "i", "records": "q", "digests": "q"}
INVERTED = bytes(255 - byte for byte in range(256))  # turns the bytes of t into those of ~t
DTYPES = {"i": ("I32", torch.int32), "q": ("I64", torch.int64)}


class _Column:
    """Numbers of one type that are appended, to a file if a path is given."""

    def __init__(self, name: str, path: Path | None) -> None:
        self.name, self._path = name, path
        self.buffer = array.array(COLUMNS[name])
        self._count, self._digest = 0, hashlib.sha256()
        self._file = None if path is None else open(path, "xb")  # noqa: SIM115 - it stays open until finish
        if self._file is not None:
            self._file.write(bytes(HEADER_BYTES))

    def flush(self, least: int = 1) -> None:
        """Writes the buffer to the file, if it has at least so many bytes."""
        if self._file is None or len(self.buffer) * self.buffer.itemsize < least:
            return
        data = self.buffer.tobytes()
        self._digest.update(data)
        self._file.write(data)
        self._count += len(self.buffer)
        del self.buffer[:]

    def finish(self) -> tuple[Tensor, str]:
        """The numbers as a tensor, and the SHA-256 of their bytes where they lie in a file."""
        if self._file is None or self._path is None:
            dtype = DTYPES[COLUMNS[self.name]][1]
            return (torch.frombuffer(self.buffer, dtype=dtype) if self.buffer else torch.empty(0, dtype=dtype)), ""
        self.flush()
        self._file.seek(0)
        self._file.write(_header(self.name, self._count))
        self._file.close()
        sync(self._path)
        return mapped(self._path, self.name, self._count), self._digest.hexdigest()

    def close(self) -> None:
        """Closes the file of an array that is given up."""
        if self._file is not None:
            self._file.close()


def _header(name: str, count: int) -> bytes:
    code = COLUMNS[name]
    size = count * array.array(code).itemsize
    entry = {name: {"dtype": DTYPES[code][0], "shape": [count], "data_offsets": [0, size]}}
    return struct.pack("<Q", HEADER_BYTES - 8) + json.dumps(entry).encode().ljust(HEADER_BYTES - 8)


def column_path(folder: Path, name: str) -> Path:
    """The file of an array."""
    return folder / f"{name}.safetensors"


def mapped(path: Path, name: str, count: int) -> Tensor:
    """The numbers of a file, mapped into memory. Raises CheckpointError for a file of another size."""
    code = COLUMNS[name]
    width, dtype = array.array(code).itemsize, DTYPES[code][1]
    if path.stat().st_size != HEADER_BYTES + count * width:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; expected {HEADER_BYTES + count * width:,}")
    whole = torch.from_file(str(path), shared=False, size=HEADER_BYTES // width + count, dtype=dtype)
    return whole[HEADER_BYTES // width :]


@dataclass(frozen=True)
class TokenArrays:
    """Examples as flat arrays; the module says what they hold. images: of the examples that have some, by number."""

    tokens: Tensor
    lengths: Tensor
    first_learned: Tensor
    learned: Tensor
    records: Tensor
    digests: Tensor
    images: Mapping[int, tuple[KeptImage, ...]] = field(default_factory=dict)

    @cached_property
    def starts(self) -> Tensor:
        """Where each example begins in `tokens`."""
        return self.lengths.long().cumsum(0) - self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def signed_tokens(self, index: int, max_length: int | None = None) -> Tensor:
        """The tokens of an example: t where learned, ~t elsewhere."""
        start, length = int(self.starts[index]), int(self.lengths[index])
        return self.tokens[start : start + (length if max_length is None else min(length, max_length))]


class ImagesInMemory(Exception):
    """Examples with images cannot be kept in files, since the files of images may change."""


class TokenWriter:
    """Appends examples to arrays, in memory, or in new files of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._count = folder, 0
        self._images: dict[int, tuple[KeptImage, ...]] = {}
        self._columns = {name: _Column(name, folder and column_path(folder, name)) for name in COLUMNS}

    def append(self, record: int, examples: Sequence[Marked]) -> None:
        """Appends the examples of one record. Raises ImagesInMemory for one with images if there is a folder."""
        first = len(self._columns["tokens"].buffer)
        tokens = self._columns["tokens"].buffer
        for example in examples:
            if example.images:
                if self._folder is not None:
                    raise ImagesInMemory
                self._images[self._count] = example.images
            self._count += 1
            ids = array.array("i", example.ids)
            signed = array.array("i", ids.tobytes().translate(INVERTED))
            for begin, end in example.learned:
                signed[begin:end] = ids[begin:end]
            tokens.extend(signed)
            counted = [(max(begin, 1), end) for begin, end in example.learned if end > max(begin, 1)]
            self._columns["lengths"].buffer.append(len(example.ids))
            self._columns["first_learned"].buffer.append(counted[0][0] if counted else NEVER)
            self._columns["learned"].buffer.append(sum(end - begin for begin, end in counted))
            self._columns["records"].buffer.append(record)
        digest = hashlib.blake2b(memoryview(tokens)[first:], digest_size=8)
        for example in examples:
            for image in example.images:
                digest.update(image.digest)
        number = int.from_bytes(digest.digest(), "little", signed=True)
        self._columns["digests"].buffer.extend([number] * len(examples))
        for column in self._columns.values():
            column.flush(BUFFER_BYTES)

    def finish(self) -> tuple[TokenArrays, dict[str, str]]:
        """The arrays, and the SHA-256 of each file."""
        finished = {name: column.finish() for name, column in self._columns.items()}
        columns = {name: pair[0] for name, pair in finished.items()}
        return TokenArrays(**columns, images=self._images), {name: pair[1] for name, pair in finished.items()}

    def close(self) -> None:
        """Closes the files of arrays that are given up."""
        for column in self._columns.values():
            column.close()


class Examples(Sequence[TokenizedExample]):
    """Chosen examples of arrays, truncated to `max_length`. Indexing makes an example; a slice is a view.

    chosen: the numbers of the examples (int64); None chooses all.
    """

    def __init__(self, arrays: TokenArrays, chosen: Tensor | None = None, max_length: int | None = None) -> None:
        self.arrays, self.max_length = arrays, max_length
        self.chosen = torch.arange(len(arrays)) if chosen is None else chosen

    @property
    def has_images(self) -> bool:
        """Whether there are images; those of examples that are not chosen count too."""
        return bool(self.arrays.images)

    @cached_property
    def lengths(self) -> Tensor:
        """The tokens of each example (int32), truncated ones at `max_length`."""
        lengths = self.arrays.lengths[self.chosen]
        return lengths if self.max_length is None else lengths.clamp(max=self.max_length)

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | Examples:
        if isinstance(index, slice):
            return self.view(self.chosen[torch.arange(len(self))[index]])
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.made(index)

    def view(self, chosen: Tensor) -> Examples:
        """Returns other examples of the same arrays. chosen: their numbers (int64)."""
        return type(self)(self.arrays, chosen, self.max_length)

    def made(self, index: int) -> TokenizedExample:
        """Returns an example; indexing checks the index first."""
        signed = self.arrays.signed_tokens(int(self.chosen[index]), self.max_length)
        learned = signed >= 0
        ids = torch.where(learned, signed, ~signed)
        images = self.arrays.images.get(int(self.chosen[index]), ())
        return TokenizedExample(ids.tolist(), torch.where(learned, signed, IGNORE_INDEX).tolist(), images)

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    @property
    def truncated(self) -> int:
        """How many examples are cut at `max_length`."""
        return 0 if self.max_length is None else int((self.arrays.lengths[self.chosen] > self.max_length).sum())

    @property
    def learned_tokens(self) -> int:
        """How many tokens the loss counts, over all examples."""
        counts = self.arrays.learned[self.chosen]
        if self.max_length is None:
            return int(counts.sum())
        cut = self.arrays.lengths[self.chosen] > self.max_length
        of_cut = sum(
            int((self.arrays.signed_tokens(index, self.max_length)[1:] >= 0).sum())
            for index in self.chosen[cut].tolist()
        )
        return int(counts[~cut].sum()) + of_cut


def with_something_to_learn(arrays: TokenArrays, max_length: int | None) -> Tensor:
    """The numbers of the examples that have a learned token within `max_length`."""
    return (arrays.first_learned < (NEVER if max_length is None else max_length)).nonzero()[:, 0]
