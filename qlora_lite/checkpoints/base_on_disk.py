"""A frozen base that stays on disk: packed weights mapped where they lie, or packed into a file for that.

A folder that bitsandbytes packed is mapped as it lies. Any other checkpoint is packed once, some rows at a time, into
the cache folder (`packed_bases/`), whole or not at all, and the next load maps that file again. The file has the
buffers of each packed weight and the large plain tensors, in the order in which the model holds them, so that those of
a block lie side by side.

Small tensors are read into memory, and so are tensors of a packed folder that are not aligned for their dtype or are
stored in another dtype than the model's, and int8 rows that are stored unpacked there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_lite.checkpoints.atomic_folder import check_free_space, new_folder
from qlora_lite.checkpoints.base_identity import BaseIdentity, json_hash, weight_hashes
from qlora_lite.checkpoints.checkpoint import Checkpoint
from qlora_lite.checkpoints.files import read_json, write_json
from qlora_lite.checkpoints.layouts.bitsandbytes_layout import StoredPackedWeight
from qlora_lite.checkpoints.layouts.mapped_weights import MappedFiles, MappedPackedWeight, MappedTensor
from qlora_lite.checkpoints.lazy_tensors import READ_BYTES, LazyTensor, read_slices
from qlora_lite.checkpoints.pack_on_load import LazyPackedWeight
from qlora_lite.checkpoints.safetensors_read import StoredTensor, stored_tensors
from qlora_lite.checkpoints.safetensors_write import PlannedTensor, write_safetensors
from qlora_lite.checks import check_finite
from qlora_lite.errors import CheckpointError
from qlora_lite.offload import mapped_file
from qlora_lite.progress.work import BYTES, working
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import format_named
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.quantization.quantize_model import WeightToPack
from qlora_lite.signals import check_signals
from qlora_lite.system import locked, user_cache

FOLDER = "packed_bases"
FILE, INFO_FILE = "base.safetensors", "packed_base.json"
VERSION = 1
# Of every tensor in the packed file: kernels read a line of the cache at once.
ALIGNMENT = 64
WAIT_SECONDS = 0.2
NAMED_BY = 16  # digits of the hash in a folder's name


@dataclass(frozen=True)
class MappedCheckpoint:
    """A checkpoint whose large tensors are mapped: these packed weights and plain tensors, and the rest as it was.

    Serves `load_tensors_` in the place of a `Checkpoint`.
    """

    checkpoint: Checkpoint
    packed: Mapping[str, list[LazyPackedWeight]]
    mapped: Mapping[str, LazyTensor]

    @property
    def config(self) -> QuantConfig:
        return self.checkpoint.config

    @property
    def tensors(self) -> Mapping[str, object]:
        return self.checkpoint.tensors

    def plain(self, name: str) -> LazyTensor:
        return self.mapped[name] if name in self.mapped else self.checkpoint.plain(name)

    def packed_weights(self, name: str, to_pack: WeightToPack, dtype: torch.dtype) -> list[LazyPackedWeight]:
        return self.packed[name] if name in self.packed else self.checkpoint.packed_weights(name, to_pack, dtype)

    def weights_to_pack(self, model: nn.Module) -> list[WeightToPack]:
        return self.checkpoint.weights_to_pack(model)


def mapped_checkpoint(
    model: nn.Module, checkpoint: Checkpoint, identity: BaseIdentity, dtype: torch.dtype
) -> MappedCheckpoint:
    """Returns a checkpoint with its large tensors mapped; packs it into the cache folder first if that is needed.

    model: on the meta device. dtype: that the model is loaded in. Raises CheckpointError if the disk has no room or the
    packed file is damaged, QuantizationError for values that are NaN, infinite, or too large for the format.
    """
    if checkpoint.packed_layers:
        return _as_it_lies(model, checkpoint)
    entries = list(_entries(model, checkpoint, dtype))
    folder, key = _place(checkpoint, entries, identity)
    _pack_once(folder, entries, key, checkpoint.folder)
    return _from_packed(checkpoint, entries, _checked_file(folder, key))


def _as_it_lies(model: nn.Module, checkpoint: Checkpoint) -> MappedCheckpoint:
    files, held = MappedFiles(), model.state_dict(keep_vars=True)
    packed: dict[str, list[LazyPackedWeight]] = {}
    plain: dict[str, LazyTensor] = {}
    for name, stored in checkpoint.tensors.items():
        if isinstance(stored, StoredPackedWeight):
            _check_values(value for key, value in stored.buffers.items() if key != "packed")
            offset = stored.nested_offset
            layout = stored.format, stored.blocksize, offset is not None
            packed[name] = [MappedPackedWeight(stored.shape, *layout, stored.buffers, files, offset)]
        elif isinstance(stored, StoredTensor) and stored.dtype == held[name].dtype and files.can_hold(stored):
            _check_values((stored,))
            plain[name] = MappedTensor(stored, files)
    return MappedCheckpoint(checkpoint, packed, plain)


def _check_values(tensors: Iterable[StoredTensor]) -> None:
    """Raises QuantizationError for values that are NaN or infinite."""
    for stored in tensors:
        for first, rows in read_slices(stored, READ_BYTES):
            check_finite(rows, stored.name, first)


class _PackedOnce:
    """A weight that is packed when its first buffer is written, and freed after the last."""

    def __init__(self, weight: LazyPackedWeight, names: list[str]) -> None:
        self._weight, self._last = weight, names[-1]
        self._packed: PackedWeight | None = None

    def buffer(self, name: str) -> Iterator[Tensor]:
        if self._packed is None:
            self._packed = self._weight.load(torch.device("cpu"))
        yield getattr(self._packed, name)
        if name == self._last:
            self._packed = None


@dataclass(frozen=True)
class _Entry:
    """A tensor of the model in the packed file: its parts there by name.

    to_pack: None for a plain tensor. matrix: the number of a matrix in a stack, else 0.
    """

    name: str
    parts: dict[str, PlannedTensor]
    to_pack: WeightToPack | None = None
    shape: tuple[int, ...] = ()
    matrix: int = 0

    def key(self, part: str) -> str:
        """The name of a part in the file."""
        return f"{self.name}[{self.matrix}].{part}" if self.to_pack is not None else self.name


def _entries(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[_Entry]:
    """Yields what the packed file holds, in the order of the model's tensors."""
    to_pack = {id(found.weight): found for found in checkpoint.weights_to_pack(model)}
    for name, target in model.state_dict(keep_vars=True).items():
        if name not in checkpoint.tensors:
            continue
        found = to_pack.get(id(target))
        if found is None:
            if target.is_floating_point() and target.nbytes >= mapped_file.LEAST_BYTES:
                rows = _Rounded(checkpoint.plain(name), target.dtype)
                yield _Entry(name, {"": PlannedTensor(tuple(target.shape), target.dtype, rows.slices)})
            continue
        for number, weight in enumerate(checkpoint.packed_weights(name, found, dtype)):
            config, row = checkpoint.config, format_named(found.format)
            layout = row.buffers(weight.shape, config.blocksize, config.double_quant)
            names = [part for part in layout if part != "nested_code"]
            once = _PackedOnce(weight, names)
            parts = {part: _planned(layout[part].shape, layout[part].dtype, once, part) for part in names}
            yield _Entry(name, parts, found, weight.shape, number)


def _planned(shape: tuple[int, ...], dtype: str, once: _PackedOnce, name: str) -> PlannedTensor:
    return PlannedTensor(shape, getattr(torch, dtype), lambda: once.buffer(name))


@dataclass(frozen=True)
class _Rounded:
    """A plain tensor in the dtype in which the model holds it."""

    stored: LazyTensor
    dtype: torch.dtype

    def slices(self) -> Iterator[Tensor]:
        """Yields its rows. Raises QuantizationError for values that are NaN or infinite."""
        for first, rows in read_slices(self.stored, READ_BYTES):
            part = rows.to(self.dtype)
            check_finite(part, self.stored.name, first)
            yield part


def _place(checkpoint: Checkpoint, entries: list[_Entry], identity: BaseIdentity) -> tuple[Path, dict[str, object]]:
    """Returns the folder of the packed file, and what must be equal for it to be used again."""
    layout = [[entry.key(part), plan.shape, str(plan.dtype)] for entry in entries for part, plan in entry.parts.items()]
    formats = sorted({f"{entry.name} {entry.to_pack.format}" for entry in entries if entry.to_pack is not None})
    sources = sorted(checkpoint.folder.glob("*.safetensors"))
    states = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
    key: dict[str, object] = {
        "version": VERSION,
        "layout": json_hash([layout, formats, checkpoint.config.blocksize]),
        "weights": None if identity.weights is None else identity.weights.sample,
        "files": json_hash(states),
    }
    name = checkpoint.folder.absolute().name or "base"
    return user_cache() / FOLDER / f"{name}-{json_hash(key)[:NAMED_BY]}", key


def _padded(entries: list[_Entry]) -> dict[str, PlannedTensor]:
    """Returns the tensors of the file by name, each at a multiple of `ALIGNMENT` bytes by tensors of zeros between."""
    tensors: dict[str, PlannedTensor] = {}
    for entry in entries:
        for part, plan in entry.parts.items():
            tensors[entry.key(part)] = plan
            if rest := -plan.nbytes % ALIGNMENT:
                tensors[f"{entry.key(part)}.padding"] = PlannedTensor((rest,), torch.uint8, _zeros(rest))
    return tensors


def _zeros(count: int) -> Callable[[], Iterable[Tensor]]:
    return lambda: [torch.zeros(count, dtype=torch.uint8)]


def _pack_once(folder: Path, entries: list[_Entry], key: Mapping[str, object], source: Path) -> None:
    """Packs into a folder unless that is done, or another process is at it, which is waited for."""
    lock = folder.with_name(f".{folder.name}.lock")
    while not (folder / INFO_FILE).is_file():
        check_signals()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(lock):
                if not (folder / INFO_FILE).is_file():  # another process may have finished just now
                    _pack(folder, entries, key, source)
        except BlockingIOError:
            time.sleep(WAIT_SECONDS)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error


def _pack(folder: Path, entries: list[_Entry], key: Mapping[str, object], source: Path) -> None:
    """Writes the packed file into its folder, whole or not at all."""
    tensors = _padded(entries)
    total = sum(plan.nbytes for plan in tensors.values())
    with new_folder(folder, overwrite=True) as temporary, working("packing to disk", total, BYTES) as work:
        check_free_space(folder, total)
        write_safetensors(temporary / FILE, tensors, work.advance, ALIGNMENT)
        written = weight_hashes(stored_tensors(temporary / FILE), packed=True)
        sums = {"layout": written.layout, "sample": written.sample}
        write_json(temporary / INFO_FILE, {"packed_from": str(source.absolute()), "key": key, "written": sums})


def _checked_file(folder: Path, key: Mapping[str, object]) -> dict[str, StoredTensor]:
    """Returns the tensors of a packed file. Raises CheckpointError if it is not the one that was written."""
    try:
        info, stored = read_json(folder / INFO_FILE), stored_tensors(folder / FILE)
        found = weight_hashes(stored, packed=True)
        if info.get("key") != key or info.get("written") != {"layout": found.layout, "sample": found.sample}:
            raise CheckpointError("its bytes are not those that were written")
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is damaged ({error}); remove it, and the base is packed again") from error
    return stored


def _from_packed(checkpoint: Checkpoint, entries: list[_Entry], stored: Mapping[str, StoredTensor]) -> MappedCheckpoint:
    files, config = MappedFiles(), checkpoint.config
    packed: dict[str, list[LazyPackedWeight]] = {}
    plain: dict[str, LazyTensor] = {}
    for entry in entries:
        if entry.to_pack is None:
            plain[entry.name] = MappedTensor(stored[entry.key("")], files)
            continue
        buffers = {part: stored[entry.key(part)] for part in entry.parts}
        format = entry.to_pack.format
        weight = MappedPackedWeight(entry.shape, format, config.blocksize, "nested_absmax" in buffers, buffers, files)
        packed.setdefault(entry.name, []).append(weight)
    return MappedCheckpoint(checkpoint, packed, plain)
