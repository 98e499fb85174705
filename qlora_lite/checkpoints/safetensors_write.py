"""Writes safetensors files a few rows of a tensor at a time.

The step of a weight on its way out between export/plan.py, which plans each tensor, and atomic_folder.py.

The safetensors package is not used for this, because it needs all tensors of a file in memory at once. The format is a
length (8 bytes, little endian), a JSON header of that length with the dtype, shape and byte range of each tensor, and
the bytes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from qlora_lite.checkpoints.files import write_json
from qlora_lite.errors import CheckpointError
from qlora_lite.offload.mapped_file import release
from qlora_lite.progress.work import BYTES, working
from qlora_lite.signals import check_signals
from qlora_lite.system import O_DIRECT

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5 * 10**9
LENGTH_BYTES = ALIGNMENT = 8


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: its layout is known beforehand, its values are computed when it is written.

    slices: yields the rows in order, some at a time. For a stack of matrices it may yield the rows of each matrix, one
    matrix after the other.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def planned(tensor: Tensor) -> PlannedTensor:
    """Returns the `PlannedTensor` that writes an existing tensor."""

    def whole() -> Iterator[Tensor]:
        yield tensor
        release(tensor)

    return PlannedTensor(tuple(tensor.shape), tensor.dtype, whole)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor in row-major order; without a copy if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, PlannedTensor], alignment: int) -> bytes:
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + LENGTH_BYTES) % alignment)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def write_safetensors(
    path: Path,
    tensors: Mapping[str, PlannedTensor],
    on_bytes: Callable[[int], None] = lambda written: None,
    alignment: int = ALIGNMENT,
) -> None:
    """Writes one file, tensor by tensor and slice by slice, and flushes it to the disk.

    on_bytes: is called with the bytes of each slice. alignment: the first tensor begins at a multiple of so many bytes,
    8 or a multiple of that.

    Raises CheckpointError if the slices of a tensor differ from its plan in dtype, shape or size.
    """
    with open(path, "wb", buffering=0) as file, _Writer(file) as writer:
        writer.write(_header(tensors, alignment))
        for name, plan in tensors.items():
            written = 0
            for rows in plan.slices():
                check_signals()
                piece = rows.detach().cpu().contiguous()
                written += piece.nbytes
                fits = tuple(piece.shape[1:]) == plan.shape[len(plan.shape) - piece.dim() + 1 :]
                if piece.dtype != plan.dtype or not fits or written > plan.nbytes:
                    got = f"{tuple(piece.shape)} of {piece.dtype}"
                    raise CheckpointError(f"{name} was planned as {plan.shape} of {plan.dtype}; got {got}")
                writer.write(raw_bytes(piece))
                on_bytes(piece.nbytes)
            if written != plan.nbytes:
                raise CheckpointError(f"{name} was planned as {plan.nbytes} bytes; got {written}")


class _Writer:
    """Writes pieces to a new file in a separate thread, so that the caller can compute the next pieces meanwhile.

    Bypasses the page cache (open(2), O_DIRECT) where the file system allows it, and writes whole blocks from
    page-aligned memory: with a large file the kernel would spend more time on finding and filling pages than on the
    disk, and would evict the pages of other files. Pieces are copied into blocks, and a block is filled while those
    before it are written: a caller waits only if all blocks are full, on a disk that is slower than it.
    """

    BLOCK_BYTES = 2 << 20
    BLOCKS = 3

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor = file.fileno()
        self._direct = _set_direct(self._descriptor, True)
        self._blocks = itertools.cycle([memoryview(mmap.mmap(-1, self.BLOCK_BYTES)) for _ in range(self.BLOCKS)])
        self._block, self._filled = next(self._blocks), 0
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._writing: deque[Future[None]] = deque()

    def write(self, piece: bytes | memoryview) -> None:
        """Copies a piece; starts to write each block that is full. Raises the error of an earlier block."""
        piece = memoryview(piece)
        while piece:
            part = piece[: self.BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            piece, self._filled = piece[len(part) :], self._filled + len(part)
            if self._filled == self.BLOCK_BYTES:
                self._writing.append(self._pool.submit(self._write, self._block))
                if len(self._writing) == self.BLOCKS:
                    self._writing.popleft().result()  # of the block that is filled next
                self._block, self._filled = next(self._blocks), 0

    def _write(self, block: memoryview) -> None:
        while block:
            try:
                block = block[os.write(self._descriptor, block) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = _set_direct(self._descriptor, False)  # the flag was accepted, but is not supported
            if block and self._direct:  # the rest of the block is not aligned
                self._direct = _set_direct(self._descriptor, False)

    def _finish(self) -> None:
        for written in self._writing:
            written.result()
        self._direct = _set_direct(self._descriptor, False)  # the last block is not full
        self._write(self._block[: self._filled])
        os.fsync(self._descriptor)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown(cancel_futures=True)


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Sets or clears O_DIRECT; returns whether writes now bypass the page cache."""
    if not O_DIRECT:
        return False
    import fcntl  # not on every system, but where that flag is

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | O_DIRECT if wanted else flags & ~O_DIRECT)
    except OSError:
        return False
    return wanted


def write_sharded(
    folder: Path, tensors: Mapping[str, PlannedTensor], max_shard_bytes: int, work_name: str = "writing"
) -> list[str]:
    """Writes tensors as one file, or as shards of at most `max_shard_bytes` with an index; returns the file names.

    A larger tensor gets a shard of its own. huggingface_hub plans the shards, as it does for transformers.
    work_name: of the progress that is shown.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    shapes = {name: torch.empty(plan.shape, dtype=plan.dtype, device="meta") for name, plan in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_bytes)
    total = sum(plan.nbytes for plan in tensors.values())
    with working(work_name, total, BYTES) as work:
        for file, names in split.filename_to_tensors.items():
            write_safetensors(folder / file, {name: tensors[name] for name in names}, work.advance)
    if split.is_sharded:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename})
    return list(split.filename_to_tensors)
