"""Writes and reads GGUF files with the `gguf` package. No other file of the package imports it.

Tensors are written some rows at a time and compared while they are in memory: what was written, unpacked by the
package's own functions, with the values. `check_file` then reads the file back with the package's reader.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qlora_lite.checkpoints.safetensors_write import raw_bytes
from qlora_lite.checks import cast_finite
from qlora_lite.errors import CheckpointError, ConfigError, QuantizationError
from qlora_lite.progress.work import BYTES, working
from qlora_lite.signals import check_signals

# The types of tensors by the name that users give, with the dtype of those that are floats.
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCK = 32  # values that have a scale in common, in both packed types
PACKED = ("q8_0", "q4_0")
TYPES = (*FLOATS, *PACKED)
# Names of llama.cpp's file types.
FILE_TYPES = {"f32": "ALL_F32", **{name: f"MOSTLY_{name.upper()}" for name in TYPES if name != "f32"}}
# The largest error of a value, as a part of the largest magnitude of its block, and in units of fp16's smallest number.
# Half a step of the scale m / 127, or a whole one of m / 8 (the value opposite to m has no code), and what rounding the
# scale to fp16 adds: 2**-11 of it, or half of the smallest number, times the code.
ERROR_OF_BLOCK = {"q8_0": (0.5 / 127 + 2**-11, 64.0), "q4_0": (1 / 8 + 2**-10, 4.0)}
SMALLEST_FP16 = 2.0**-24
READ_BYTES = 4 << 20

Settings = dict[str, Any]


def gguf() -> Any:
    """Returns the package. Raises ConfigError where it cannot be imported."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError("a GGUF file needs the gguf package; run: pip install 'qlora-lite[gguf]'") from error


def is_installed() -> bool:
    """Whether the package can be imported."""
    return importlib.util.find_spec("gguf") is not None


def tensor_names(architecture: str, layers: int) -> Callable[[str], str | None]:
    """Returns the function that gives GGUF's name of a tensor of a checkpoint; None for one that it does not know."""
    library = gguf()
    kind = next(kind for kind, name in library.MODEL_ARCH_NAMES.items() if name == architecture)
    names = library.get_tensor_name_map(kind, layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file, in torch's order of dimensions. pieces: yields whole rows, in order."""

    name: str
    shape: tuple[int, ...]
    type: str
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def bytes_written(self) -> int:
        """The size in the file, without padding."""
        values = math.prod(self.shape)
        if self.type in FLOATS:
            return values * FLOATS[self.type].itemsize
        block, size = gguf().GGML_QUANT_SIZES[_type(self.type)]
        return values // int(block) * int(size)


@dataclass(frozen=True)
class WrittenTensor:
    """What was written of a tensor. digest: of its bytes. squares, error: sums of squares of its values, and of what
    packing changed."""

    tensor: GgufTensor
    digest: bytes
    squares: float
    error: float


def _type(name: str) -> Any:
    return gguf().GGMLQuantizationType[name.upper()]


def write_gguf(
    path: Path,
    architecture: str,
    settings: Mapping[str, Any],
    tensors: Sequence[GgufTensor],
    keys: Mapping[str, str | float] | None = None,
) -> list[WrittenTensor]:
    """Writes a GGUF file, tensor by tensor and piece by piece, and flushes it to the disk.

    settings: values by the names of GGUFWriter's methods without `add_`. keys: further ones, by their full names.
    Raises QuantizationError, naming the tensor, for values that its type cannot hold.
    """
    library = gguf()
    writer = library.GGUFWriter(path, architecture)
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    for key, other in (keys or {}).items():
        (writer.add_string if isinstance(other, str) else writer.add_float32)(key, other)
    for tensor in tensors:
        like = torch.empty(0, dtype=torch.float32).numpy().dtype
        writer.add_tensor_info(tensor.name, tensor.shape, like, tensor.bytes_written, raw_dtype=_type(tensor.type))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        written = []
        with working("writing GGUF", sum(tensor.bytes_written for tensor in tensors), BYTES) as work:
            for tensor in tensors:
                written.append(_write_tensor(file, tensor))
                writer.write_padding(file, tensor.bytes_written)
                work.advance(tensor.bytes_written)
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()
    return written


def _write_tensor(file: Any, tensor: GgufTensor) -> WrittenTensor:
    digest, size, squares, error = hashlib.blake2b(), 0, 0.0, 0.0
    for piece in tensor.pieces():
        check_signals()
        if tensor.type in FLOATS:
            block = raw_bytes(cast_finite(piece, FLOATS[tensor.type], tensor.name))
        else:
            values = cast_finite(piece, torch.float32, tensor.name).reshape(-1, tensor.shape[-1])
            packed, unpacked = _packed(values, tensor)
            block = packed.reshape(-1).data
            squares += float(values.double().square().sum())
            error += float((unpacked - values).double().square().sum())
        digest.update(block)
        size += len(block)
        file.write(block)
    if size != tensor.bytes_written:
        raise CheckpointError(f"{tensor.name} was planned as {tensor.bytes_written} bytes; got {size}")
    return WrittenTensor(tensor, digest.digest(), squares, error)


def _packed(values: Tensor, tensor: GgufTensor) -> tuple[Any, Tensor]:
    """Packs rows of fp32; returns the bytes, and what they unpack to. Raises QuantizationError for a larger error."""
    library, kind = gguf(), _type(tensor.type)
    packed = library.quants.quantize(values.contiguous().numpy(), kind)
    unpacked = torch.from_numpy(library.quants.dequantize(packed, kind)).reshape(values.shape)
    blocks, errors = values.reshape(-1, BLOCK), (unpacked - values).reshape(-1, BLOCK)
    share, smallest = ERROR_OF_BLOCK[tensor.type]
    allowed = blocks.abs().amax(1) * share + smallest * SMALLEST_FP16
    if not bool((errors.abs().amax(1) <= allowed).all()):  # not finite included
        raise QuantizationError(f"{tensor.name} has values that {tensor.type} cannot hold; write f16, bf16 or f32")
    return packed, unpacked


def check_file(path: Path, written: Sequence[WrittenTensor]) -> None:
    """Reads a file back with the package's reader. Raises CheckpointError unless its tensors are those written.

    The reader says where each tensor lies; the bytes are read and not mapped, so that they do not stay resident.
    """
    found = gguf().GGUFReader(path).tensors
    expected = {tensor.tensor.name: tensor for tensor in written}
    if [tensor.name for tensor in found] != list(expected):
        raise CheckpointError(f"{path} was read back with other tensors than were written")
    size = sum(int(tensor.n_bytes) for tensor in found)
    with open(path, "rb") as file, working("reading back", size, BYTES) as work:
        for tensor in found:
            wanted = expected[tensor.name]
            same = tensor.tensor_type == _type(wanted.tensor.type)
            same = same and tuple(int(size) for size in reversed(tensor.shape)) == wanted.tensor.shape
            file.seek(int(tensor.data_offset))
            if not same or _digest(file, int(tensor.n_bytes)) != wanted.digest:
                raise CheckpointError(
                    f"{path} was read back with another {tensor.name} than was written; check the disk"
                )
            work.advance(int(tensor.n_bytes))


def _digest(file: BinaryIO, size: int) -> bytes:
    """Returns the digest of the next bytes of a file."""
    digest = hashlib.blake2b()
    for start in range(0, size, READ_BYTES):
        check_signals()
        digest.update(file.read(min(READ_BYTES, size - start)))
    return digest.digest()


@dataclass(frozen=True)
class StoredGguf:
    """A tensor of a GGUF file, or a matrix of it, in torch's order of dimensions.

    kind: the package's name of its type. begin, size: where its bytes are. Each read opens and closes the file, so that
    the folder can be renamed on any system.
    """

    path: Path
    shape: tuple[int, ...]
    kind: Any
    begin: int
    size: int

    def matrix(self, index: int) -> StoredGguf:
        """Returns the matrix at an index of a stack."""
        size = self.size // self.shape[0]
        return replace(self, shape=self.shape[1:], begin=self.begin + index * size, size=size)

    def rows(self, start: int, stop: int) -> Tensor:
        """Reads rows `start` to `stop` of the first dimension, unpacked, in fp32."""
        check_signals()
        row = self.size // self.shape[0]
        with open(self.path, "rb") as file:
            file.seek(self.begin + start * row)
            content = torch.frombuffer(bytearray(file.read((stop - start) * row)), dtype=torch.uint8)
        lines = math.prod(self.shape[:-1]) // self.shape[0] if len(self.shape) > 1 else 1
        packed = content.view((stop - start) * lines, -1).numpy()
        values = gguf().quants.dequantize(packed, self.kind)
        return torch.from_numpy(values.astype("float32")).reshape(stop - start, *self.shape[1:])


def open_gguf(path: Path) -> dict[str, StoredGguf]:
    """Returns the tensors of a file by their names; they are not read."""
    return {
        tensor.name: StoredGguf(
            path,
            tuple(int(size) for size in reversed(tensor.shape)),
            tensor.tensor_type,
            int(tensor.data_offset),
            int(tensor.n_bytes),
        )
        for tensor in gguf().GGUFReader(path).tensors
    }
