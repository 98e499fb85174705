"""`DiskSource`: a frozen base whose blocks are read from mapped files ahead of their time, and let go after it.

A thread asks the kernel for the bytes of the next block while the current one is computed. So the process holds two
blocks at most. What lies outside of the blocks, embedding and output head, is read when it is touched, and let go when
a block arrives. Tensors that are not in a mapped file, adapters and statistics, stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from qlora_lite.errors import ConfigError
from qlora_lite.offload.block_order import follow_blocks_
from qlora_lite.offload.mapped_file import MappedFile, Span, is_mapped, mapped_spans
from qlora_lite.surgery import repeated_blocks

ATTRIBUTE = "base_on_disk"
# Tensors with fewer bytes between them are read as one piece.
GAP = 64 << 10


class _Held(NamedTuple):
    """A tensor in a mapped file, its name in the model, and its version when the model was loaded."""

    name: str
    tensor: Tensor
    version: int


class _Part:
    """The mapped tensors of a block, or of what is outside of the blocks."""

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        tensors = {id(tensor): (name, tensor) for name, tensor in named}
        found: dict[MappedFile, list[Span]] = {}
        self._held: list[_Held] = []
        for tensor, file, span in mapped_spans(tensor for _, tensor in tensors.values()):
            self._held.append(_Held(tensors[id(tensor)][0], tensor, tensor._version))
            found.setdefault(file, []).append(span)
        self._pieces = [(file, piece) for file, spans in found.items() for piece in _joined(spans)]

    @property
    def nbytes(self) -> int:
        return sum(held.tensor.nbytes for held in self._held)

    def fetch(self) -> None:
        for file, piece in self._pieces:
            file.fetch(piece)

    def check(self) -> None:
        """Raises CheckpointError for a file that was written to."""
        for file, _ in self._pieces:
            file.check()

    def drop(self) -> None:
        """Raises ConfigError for a tensor that was written to, which would lose what was written."""
        for held in self._held:
            if held.tensor._version != held.version:
                raise ConfigError(
                    f"{held.name} was written to, and the base lies on disk and is only read; load the model with "
                    f"base='memory' to change its weights"
                )
        for file, piece in self._pieces:
            file.drop(piece)


def _joined(spans: list[Span]) -> list[Span]:
    """Returns spans in order, those joined between which there is little."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and span.start - joined[-1].stop <= GAP:
            joined[-1] = Span(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return joined


class DiskSource:
    """The base of a model in mapped files, block by block; see `BlockSource`.

    It belongs to its model as `model.base_on_disk`. A deep copy of the model would hold the whole base in memory, and
    is refused.
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = list(dict.fromkeys(repeated_blocks(model)))
        in_blocks = {id(part) for block in blocks for part in block.modules()}
        outside = {
            f"{path}.{name}".lstrip("."): (module, tensor)
            for path, module in model.named_modules()
            if id(module) not in in_blocks
            for name, tensor in {**module._parameters, **module._buffers}.items()
            if tensor is not None
        }
        names = {id(block): path for path, block in model.named_modules()}
        self._blocks = [_Part(_named(block, names[id(block)])) for block in blocks]
        self._outside = _Part((name, tensor) for name, (_, tensor) in outside.items())
        self._coming: dict[int, Future[None]] = {}
        holders = {id(module): module for module, tensor in outside.values() if is_mapped(tensor)}
        for module in [model, *holders.values()]:
            module.register_forward_pre_hook(self._before_outside)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="base-on-disk")

    @property
    def block_bytes(self) -> Sequence[int]:
        """The bytes of each block that lie on disk."""
        return [block.nbytes for block in self._blocks]

    @property
    def outside_bytes(self) -> int:
        """The bytes on disk of what is outside of the blocks."""
        return self._outside.nbytes

    def arrive(self, block: int) -> None:
        """Raises CheckpointError if a file was changed or cannot be read, ConfigError if a weight was written to."""
        coming = self._coming.pop(block, None)
        for other in list(self._coming):  # announced, and another one came
            self._coming.pop(other).result()
            self._blocks[other].drop()
        self._outside.drop()
        if coming is None:
            self._blocks[block].fetch()
        else:
            coming.result()

    def next(self, block: int) -> None:
        self._coming[block] = self._reader.submit(self._blocks[block].fetch)

    def leave(self, block: int) -> None:
        self._blocks[block].drop()

    def _before_outside(self, module: nn.Module, args: object) -> None:
        """Checks the files before what is outside of the blocks is touched."""
        self._outside.check()

    def release(self) -> None:
        """Lets go of all that was read."""
        for part in (*self._blocks, self._outside):
            part.drop()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise ConfigError(
            "a model whose base lies on disk cannot be copied, since the copy would hold the base in memory; load it "
            "again"
        )

    def __reduce__(self) -> NoReturn:
        raise ConfigError("a model whose base lies on disk cannot be pickled; save its adapters (save_adapter)")


def _named(block: nn.Module, path: str) -> Iterable[tuple[str, Tensor]]:
    return (*block.named_parameters(path), *block.named_buffers(path))


def attach_disk_source_(model: nn.Module) -> DiskSource:
    """Reads the mapped tensors of a model block by block from now on, whatever runs the model."""
    source = DiskSource(model)
    follow_blocks_(model, source)
    setattr(model, ATTRIBUTE, source)
    return source


def disk_source(model: nn.Module) -> DiskSource | None:
    """Returns the `DiskSource` of a model; None for a model whose base is in memory."""
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, DiskSource) else None
