"""Folders of safetensors files: writing that never leaves half a folder. (Reading: tensor_files.py.)

Files are written here, not by the safetensors package, because that one needs every tensor of a file in memory at
once. The format is a length (8 bytes, little endian), a JSON header of that length with the dtype, shape and byte
range of each tensor, and the bytes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import math
import mmap
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_lite.errors import CheckpointError
from qlora_lite.exchange import exchanged
from qlora_lite.regular_files import LARGEST_JSON, open_regular
from qlora_lite.signals import poll, stoppable, unfinished

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
# What a folder may hold that is replaced as a whole: the files that checkpoints, adapters and runs consist of.
CHECKPOINT_SUFFIXES = (".safetensors", ".json", ".jsonl", ".jinja", ".model")
UNFINISHED = ".partial"
# A folder whose maker holds no lock on it is abandoned; one so young may not have its lock yet.
ABANDONED_AFTER_SECONDS = 60
SPARE_BYTES = 64 << 20
DEFAULT_SHARD_BYTES = 5 * 10**9
CHECKPOINT_NAMES = ("merges.txt", "vocab.txt", "README.md")


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is made when its turn to be written comes, some rows at a time; its layout is known before.

    The rows may be those of the matrices of a stack, one matrix after the other.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: Callable[[], Iterable[Tensor]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def planned(tensor: Tensor) -> PlannedTensor:
    """An existing tensor as a plan."""
    return PlannedTensor(tuple(tensor.shape), tensor.dtype, lambda: [tensor])


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, row by row; of one in this process's memory, and whole, without a copy."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def sync(path: Path) -> None:
    """Has a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(tensors: Mapping[str, PlannedTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.bytes
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, tensors: Mapping[str, PlannedTensor]) -> None:
    """Writes one file, a slice of a tensor at a time in the order given, and syncs it to disk."""
    with open(path, "wb", buffering=0) as file, _Writer(file) as writer:
        writer.write(_header(tensors))
        for name, plan in tensors.items():
            written = 0
            for rows in plan.slices():
                poll()
                piece = rows.detach().cpu().contiguous()
                written += piece.nbytes
                fits = tuple(piece.shape[1:]) == plan.shape[len(plan.shape) - piece.dim() + 1 :]
                if piece.dtype != plan.dtype or not fits or written > plan.bytes:
                    got = f"{tuple(piece.shape)} of {piece.dtype}"
                    raise CheckpointError(f"{name} was planned as {plan.shape} of {plan.dtype}; got {got}")
                writer.write(raw_bytes(piece))
            if written != plan.bytes:
                raise CheckpointError(f"{name} was planned as {plan.bytes} bytes; got {written}")


class _Writer:
    """Writes pieces to a new file in a thread of its own, so that the next one is made meanwhile, and syncs the file.

    Bytes go to the disk past the page cache (open(2), O_DIRECT) where the file system has it, in whole blocks from
    memory at a page's border: a large file would cost more time in pages that the kernel has to find and fill than in
    the disk, and would drive out what others have read. At most one piece waits: memory is that of two, and a block.
    """

    BLOCK_BYTES = 4 << 20

    def __init__(self, file: Any) -> None:
        self._descriptor = file.fileno()
        self._direct = _set_direct(self._descriptor, True)
        self._block, self._filled = memoryview(mmap.mmap(-1, self.BLOCK_BYTES)), 0
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None

    def write(self, piece: bytes | memoryview) -> None:
        """Waits for the piece before, and raises what went wrong with it."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(self._gather, memoryview(piece))

    def _gather(self, piece: memoryview) -> None:
        while piece:
            part = piece[: self.BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            piece, self._filled = piece[len(part) :], self._filled + len(part)
            if self._filled == self.BLOCK_BYTES:
                self._write(self._block)
                self._filled = 0

    def _write(self, block: memoryview) -> None:
        while block:
            try:
                block = block[os.write(self._descriptor, block) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = _set_direct(self._descriptor, False)  # it took the flag, and cannot do it
            if block and self._direct:  # what is left begins at no border
                self._direct = _set_direct(self._descriptor, False)

    def _finish(self) -> None:
        self._direct = _set_direct(self._descriptor, False)  # the last bytes are no whole block
        self._write(self._block[: self._filled])
        os.fsync(self._descriptor)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._pool:
            if kind is None:
                if self._last is not None:
                    self._last.result()
                self._finish()


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Has writes go past the page cache, or not; whether they do."""
    flag = getattr(os, "O_DIRECT", 0)  # Linux only
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | flag if wanted else flags & ~flag)
    except OSError:
        return False
    return wanted and flag != 0


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON and syncs it to disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk. CheckpointError when the file is missing, unreadable, or holds something else."""
    try:
        with open_regular(path, "a JSON file", LARGEST_JSON) as file:
            value = json.loads(file.read().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8 and numbers of too many digits, too
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object; got a {type(value).__name__}")
    return value


def write_sharded(folder: Path, tensors: Mapping[str, PlannedTensor], max_shard_bytes: int) -> list[str]:
    """Writes tensors as one file, or as shards of at most that size with an index; returns the file names.

    A tensor larger than a shard gets one of its own. The layout is transformers' (huggingface_hub plans it).
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    shapes = {name: torch.empty(plan.shape, dtype=plan.dtype, device="meta") for name, plan in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        total = sum(plan.bytes for plan in tensors.values())
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename})
    return list(split.filename_to_tensors)


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Raises CheckpointError for a folder that must not, or cannot, be replaced as a whole."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a folder")
    if not target.is_dir():
        return
    if os.path.ismount(target):
        raise CheckpointError(f"{target} is a mount point and cannot be replaced in one move; name a folder inside it")
    if not overwrite and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty; name another folder, or ask for overwrite")
    files = sorted(path for path in target.rglob("*") if not path.is_dir())
    foreign = [str(path.relative_to(target)) for path in files if not _is_replaceable(path)]
    if foreign:
        shown = ", ".join(foreign[:4]) + (" …" if len(foreign) > 4 else "")
        raise CheckpointError(
            f"{target} holds files that no checkpoint has, and they would be lost: {shown}; move them"
        )


def _is_replaceable(path: Path) -> bool:
    return path.suffix in CHECKPOINT_SUFFIXES or path.name in CHECKPOINT_NAMES


def check_space(target: Path, needed: int) -> None:
    """Raises CheckpointError unless the disk that is to hold `target` has so many bytes free, and some to spare."""
    place = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed + SPARE_BYTES:
        raise CheckpointError(
            f"{target} needs {needed + SPARE_BYTES:,} bytes and the disk of {place} has {free:,} free; make room, "
            f"or name a folder on another disk"
        )


def check_apart(target: Path, *inputs: Path | None) -> None:
    """Raises CheckpointError if writing the folder `target` would replace one of the inputs, or what it links to."""
    target = Path(os.path.realpath(target))
    for path in inputs:
        if path is None:
            continue
        files = [part for part in path.iterdir() if not part.is_dir()] if path.is_dir() else []
        if any(Path(os.path.realpath(part)).is_relative_to(target) for part in (path, *files)):
            raise CheckpointError(f"the output {target} would replace the input {path}; name another folder")


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes it when the block ends well, and disappears when it does not.

    Raises CheckpointError if `target` is a file, a mount point, a folder with something in it and `overwrite` is not
    set, or one with files that are no checkpoint's.
    """
    target = Path(os.path.realpath(target))  # behind a link stands the folder that is meant
    check_replaceable(target, overwrite)
    with stoppable(), _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent, f".{glob.escape(target.name)}.*{UNFINISHED}")
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=UNFINISHED, dir=target.parent))
        with unfinished(temporary):
            # mkdtemp gives 0700; a folder made in the usual way follows the umask, and keeps the group of its parent's
            # files where the parent says so (setgid, which is inherited).
            os.chmod(temporary, temporary.stat().st_mode & stat.S_ISGID | 0o777 & ~_umask())
            with locked(temporary):
                yield temporary
            sync(temporary)
            check_replaceable(target, overwrite)  # again: others may have written there meanwhile
            _put(temporary, target)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error


def _put(temporary: Path, target: Path) -> None:
    """Gives a finished folder its name; what had it before goes, after that where the file system can exchange two."""
    if not target.exists():
        os.rename(temporary, target)
    elif not exchanged(temporary, target):
        old = temporary.with_suffix(".old")  # no name of unfinished work: for an instant it is the only one there is
        os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old)
    sync(target.parent)


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Removes unfinished folders that killed processes left behind: those that nobody holds a lock on any more."""
    for left in folder.glob(pattern):
        if time.time() - left.stat().st_mtime > ABANDONED_AFTER_SECONDS:
            with suppress(BlockingIOError), locked(left):
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which goes with the process however it ends. BlockingIOError if another holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current
