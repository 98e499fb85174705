"""Fills a base in shares: each process reads the bytes of the checkpoint that its share is made of, and no others.

A share is a range of bytes of a unit (sharding/units.py). Codes of a packed weight in that range stand for rows of the
plain weight: these are read and packed, to the codes that they have in the whole weight. Packing the statistics takes
those of all rows, so the absmax of the rows, a sixteenth of their bytes, are exchanged. Of a weight that is packed in
the file, the same range of bytes is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from qlora_lite.checkpoints.lazy_tensors import READ_BYTES, LazyTensor, Narrowed, read_slices
from qlora_lite.checkpoints.pack_on_load import LazyPackedWeight
from qlora_lite.checkpoints.safetensors_read import StoredTensor
from qlora_lite.checks import check_finite
from qlora_lite.compute.environment import arithmetic
from qlora_lite.errors import ConfigError, QuantizationError
from qlora_lite.progress.work import BYTES, working
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import UNPACKED, format_named
from qlora_lite.quantization.kernels import nested_code, nested_statistics
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.sharding.base import ShardedBase
from qlora_lite.sharding.group import Group
from qlora_lite.sharding.units import OwnPart, Place, Unit
from qlora_lite.surgery import repeated_blocks


@runtime_checkable
class InFile(LazyPackedWeight, Protocol):
    """A weight whose packed bytes are in the file."""

    @property
    def buffers(self) -> Mapping[str, StoredTensor]: ...

    @property
    def nested_offset(self) -> float | None: ...

    def empty(self, device: torch.device) -> PackedWeight: ...


@runtime_checkable
class ByRows(LazyPackedWeight, Protocol):
    """A weight that is packed, or restored, from rows, which have the same codes in the whole weight."""

    def load_rows(self, start: int, stop: int, device: torch.device) -> PackedWeight: ...

    def empty(self, device: torch.device) -> PackedWeight: ...


PackedSource = InFile | ByRows


class Shares:
    """What is read into shares, noted while a model on meta is filled, and read by `fill_`."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        self.group = group
        self._in_blocks = {id(module) for block in repeated_blocks(model) for module in block.modules()}
        self._weights: dict[int, PackedSource] = {}  # by the module that holds it
        self._matrices: dict[tuple[int, str], LazyTensor] = {}

    def packed(self, source: LazyPackedWeight) -> PackedWeight:
        """Returns the packed weight of this source, without bytes."""
        assert isinstance(source, (InFile, ByRows))
        weight = source.empty(torch.device("meta"))
        if weight.double_quant:
            weight.nested_code = torch.tensor(nested_code(), device=self.group.device)
            weight.nested_offset = torch.zeros((), device=self.group.device)
        self._weights[id(weight)] = source
        return weight

    def takes(self, owners: Sequence[tuple[nn.Module, str]], tensor: Tensor, source: LazyTensor) -> bool:
        """Whether a tensor that is not packed is in shares: a matrix outside of the blocks. It stays on meta then."""
        if tensor.dim() < 2 or not isinstance(tensor, nn.Parameter) or any(id(m) in self._in_blocks for m, _ in owners):
            return False
        self._matrices |= {(id(module), name): source for module, name in owners}
        return True

    def fill_(self, model: nn.Module) -> list[str]:
        """Makes the units of a model and reads this process's shares. Returns what is wrong with values, of all."""
        base, bad = ShardedBase(model, self.group), list[str]()
        with working("loading shares", base.nbytes, BYTES) as work:
            for unit in base.units:
                self._fill_unit_(unit, bad)
                work.advance(unit.nbytes)
        return self.group.all_texts("; ".join(bad))

    def _fill_unit_(self, unit: Unit, bad: list[str]) -> None:
        """Reads the share of a unit. Errors of values are noted, because other processes wait for the statistics."""
        found: list[tuple[PackedWeight, dict[str, OwnPart], Tensor]] = []
        for holder, places in _by_holder(unit.places).items():
            parts = {name: unit.part(place) for name, place in places.items()}
            source = self._weights.get(id(holder))
            try:
                if source is None:
                    ((name, place),) = places.items()
                    _read_matrix_(self._matrices[id(holder), name], place, parts[name])
                    continue
                assert isinstance(holder, PackedWeight)
                if isinstance(source, InFile):
                    _read_packed_(source, holder, parts)
                    continue
                absmax = torch.zeros(holder.absmax.numel(), device=self.group.device)
                found.append((holder, parts, absmax))
                _pack_rows_(source, holder, parts["packed"], absmax)
            except QuantizationError as error:
                bad.append(str(error))
        if found:
            whole = self.group.sum(torch.cat([absmax for *_, absmax in found]))
            sizes = [len(absmax) for *_, absmax in found]
            for (holder, parts, _), absmax in zip(found, whole.split(sizes), strict=True):
                _put_statistics_(holder, parts, absmax)


def _by_holder(places: Sequence[Place]) -> dict[nn.Module, dict[str, Place]]:
    found: dict[nn.Module, dict[str, Place]] = {}
    for place in places:
        module, name = place.holders[0]
        found.setdefault(module, {})[name] = place
    return found


def _copy(tensor: Tensor, part: OwnPart, offset: int = 0) -> None:
    """Copies the bytes of a part out of a tensor, which begins at byte `offset` of the whole one."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    start, stop = max(part.start, offset), min(part.stop, offset + len(flat))
    if start < stop:
        part.into[start - part.start : stop - part.start] = flat[start - offset : stop - offset]


def _read_matrix_(source: LazyTensor, place: Place, part: OwnPart) -> None:
    row_bytes = place.nbytes // place.shape[0]
    first, last = part.start // row_bytes, -(-part.stop // row_bytes)
    if part.start == part.stop:
        return
    for row, rows in read_slices(Narrowed(source.name, source, 0, first, last - first), READ_BYTES):
        check_finite(rows, source.name, first + row)
        _copy(rows.to(part.into.device, place.dtype), part, (first + row) * row_bytes)


def _read_packed_(source: InFile, weight: PackedWeight, parts: dict[str, OwnPart]) -> None:
    for name, stored in source.buffers.items():
        if name not in parts:
            weight.nested_code = stored.read().to(weight.nested_code.device)
            continue
        part = parts[name]
        for start in range(part.start, part.stop, READ_BYTES):
            piece = stored.read_bytes(start, min(start + READ_BYTES, part.stop))
            if name != "packed" and stored.dtype.is_floating_point:
                check_finite(piece.view(stored.dtype), stored.name, start // stored.dtype.itemsize)
            _copy(piece.to(part.into.device), part, start)
    if source.nested_offset is not None:
        weight.nested_offset.fill_(source.nested_offset)


def _pack_rows_(source: ByRows, weight: PackedWeight, part: OwnPart, absmax: Tensor) -> None:
    """Packs the rows of a share's codes, and puts the absmax of the codes that begin in it into `absmax`."""
    (rows, columns), step, values = weight.shape, weight.row_step, 8 // weight.bits
    if part.start == part.stop:
        return
    first = part.start * values // columns // step * step
    last = min(-(-part.stop * values // (columns * step)) * step, rows)
    packed = source.load_rows(first, last, part.into.device)
    _copy(packed.packed, part, first * columns // values)
    of_one = weight.blocksize if format_named(weight.format).layout.has_blocks else columns  # values of one absmax
    begin = first * columns // of_one
    own = slice(*(-(-edge * values // of_one) for edge in (part.start, part.stop)))
    absmax[own] = packed.absmax[own.start - begin : own.stop - begin]


def _put_statistics_(weight: PackedWeight, parts: dict[str, OwnPart], absmax: Tensor) -> None:
    """Puts the statistics of a weight into its share. absmax: of all its codes."""
    if weight.double_quant:
        codes, nested, offset = nested_statistics(absmax)
        weight.nested_offset.copy_(offset)
        _copy(codes, parts["absmax"])
        _copy(nested, parts["nested_absmax"])
    else:
        _copy(absmax, parts["absmax"])


def check_same_in_all(group: Group, model: Any, settings: QuantConfig, identity: object, dtype: torch.dtype) -> None:
    """Raises ConfigError unless all processes load the same model in the same way, packed."""
    if settings.format == UNPACKED:
        raise ConfigError("shard shares out the bytes of packed weights, and format 'none' packs none; choose a format")
    tensors = {name: (list(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()}
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    group.agree(
        {
            "release of a library": str(arithmetic(group.device)),
            "model": json.dumps([tensors, config], sort_keys=True, default=str),
            "packing": f"{settings} {dtype}",
            "checkpoint": str(identity),
        }
    )
