"""`MappedFile`: tensors that lie in a file and are read when their values are, through a mapping of the file.

A mapped page is read when it is touched, or when the kernel is asked for it, and counts as resident memory of the
process until it is let go (madvise(2), MADV_DONTNEED). It then stays in the page cache as long as there is room.

A page that cannot be read ends the process by SIGBUS, without a word: the file was cut short, or the disk fails. So
pages are asked for before they are touched (MADV_POPULATE_READ, Linux 5.14), which reads them and returns an error
instead, and size and modification time of the open file are looked at each time. What is left is a file that is cut
short while one block is computed. A file that is renamed, replaced or removed stays open, with its bytes.

The mapping is private: a tensor can be written to, its pages are then copied into memory, and the file stays as it is.
Letting go of these pages would undo the writes, so whoever lets go has to know that there were none.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.system import c_function

# Smaller tensors are held in memory.
LEAST_BYTES = 64 << 10
# Advice of madvise(2) that Python does not name in all versions.
WILLNEED, DONTNEED, POPULATE_READ = 3, 4, 22
# mmap(2): the kernel need not have memory for a copy of every page. Without it, it refuses files above its memory.
MAP_NORESERVE = 0x4000

_open_files: weakref.WeakSet[MappedFile] = weakref.WeakSet()


class Span(NamedTuple):
    """Bytes `start` to `stop` of a file."""

    start: int
    stop: int


def check_can_map() -> None:
    """Raises ConfigError where the system has no madvise(2) as Linux has it."""
    if c_function("madvise") is None or not hasattr(mmap, "MAP_PRIVATE") or not os.path.exists("/proc/self/statm"):
        raise ConfigError("a base on disk needs madvise(2) of Linux, which this system lacks; load it into memory")


class MappedFile:
    """A file whose tensors are read through a private mapping; it is open until the last of its tensors is gone.

    Raises CheckpointError if it cannot be opened or mapped.
    """

    def __init__(self, path: Path) -> None:
        check_can_map()
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
            self._state = self._current_state()
            flags = mmap.MAP_PRIVATE | MAP_NORESERVE
            self._map = mmap.mmap(self._descriptor, 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CheckpointError(f"{path} cannot be mapped: {getattr(error, 'strerror', None) or error}") from error
        self._first = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._advise = c_function("madvise")
        _open_files.add(self)

    def _current_state(self) -> tuple[int, int]:
        now = os.fstat(self._descriptor)
        return now.st_size, now.st_mtime_ns

    def check(self) -> None:
        """Raises CheckpointError if the file was written to since it was opened."""
        if self._current_state() != self._state:
            raise CheckpointError(f"{self.path} was changed while it was in use; start again with the file as it was")

    def tensor(self, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns a tensor of the bytes from `begin` on, a multiple of the size of its items; nothing is read."""
        return torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=begin).view(shape)

    def span_of(self, tensor: Tensor) -> Span | None:
        """Returns the bytes of a tensor in the file; None for one that does not lie there."""
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
            return None
        start = tensor.data_ptr() - self._first
        inside = tensor.numel() > 0 and 0 <= start < len(self._map)
        return Span(start, start + tensor.nbytes) if inside else None

    def _madvise(self, span: Span, advice: int) -> int:
        """Returns 0, or the number of an error. Pages at the ends, which other tensors share, are included."""
        start = span.start // mmap.PAGESIZE * mmap.PAGESIZE
        assert self._advise is not None
        address, size = ctypes.c_void_p(self._first + start), ctypes.c_size_t(span.stop - start)
        return 0 if self._advise(address, size, advice) == 0 else ctypes.get_errno()

    def fetch(self, span: Span) -> None:
        """Reads bytes into memory, and returns once they are there. Raises CheckpointError if that is not possible."""
        self.check()
        failed = self._madvise(span, POPULATE_READ)
        if failed == errno.EINVAL:  # an older kernel
            failed = self._madvise(span, WILLNEED)
        if failed:
            self.check()
            raise CheckpointError(f"{self.path} cannot be read: {os.strerror(failed)}; check the disk")

    def drop(self, span: Span) -> None:
        """Lets go of the memory of these bytes, which are read again when they are needed."""
        self._madvise(span, DONTNEED)


def mapped_spans(tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, MappedFile, Span]]:
    """Yields (tensor, file, its bytes there) for those tensors that lie in mapped files."""
    files = list(_open_files)
    for tensor in tensors if files else ():
        for file in files:
            if (span := file.span_of(tensor)) is not None:
                yield tensor, file, span
                break


def is_mapped(tensor: Tensor) -> bool:
    """Whether the values of a tensor lie in a mapped file."""
    return any(True for _ in mapped_spans((tensor,)))


def release(*tensors: Tensor) -> None:
    """Lets go of the memory of tensors that lie in mapped files and were only read; does nothing for others."""
    for _, file, span in mapped_spans(tensors):
        file.drop(span)
