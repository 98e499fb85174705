"""Out: what was trained as an ordinary checkpoint, written a few rows at a time, with what that cost in numbers.

`export_merged` takes a model in memory, `merge_checkpoint` a checkpoint and an adapter on disk, of which no tensor is
ever held whole. Both plan every tensor first (weight_rows.py says where its rows come from), then write it:
W0 + (alpha / r) B A, summed in fp32 and cast.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_lite import hub
from qlora_lite.adapter_files import load_adapter_
from qlora_lite.config import FLOAT_DTYPES, QuantConfig, is_count, require
from qlora_lite.conversion import model_tensors
from qlora_lite.delta import Delta
from qlora_lite.errors import CheckpointError, ConfigError, TargetError
from qlora_lite.experts import PackedStack
from qlora_lite.finite import cast_finite
from qlora_lite.load import fitting, to_be_packed
from qlora_lite.lora import LoraLayer
from qlora_lite.merge_report import MergeReport, TensorFigures
from qlora_lite.quantize import PackedWeight
from qlora_lite.quantize_base import slots
from qlora_lite.storage import PlannedTensor, check_apart, check_space, new_folder, write_json, write_sharded
from qlora_lite.tensor_files import TensorFiles
from qlora_lite.tensor_views import Source
from qlora_lite.weight_rows import (
    DenseRows,
    PackedRows,
    RepackedRows,
    StoredRows,
    TransposedRows,
    WeightRows,
    common_step,
    packed_rows,
    slice_starts,
)

DEFAULT_SHARD_BYTES = 5 * 10**9
# Of fp32 values at once: what stays in the caches while it is summed, cast and measured.
SLICE_BYTES = 4 << 20
DEQUANTIZED, ORIGINAL = BASES = ("dequantized", "original")
REPORT_FILE = "merge_report.json"


@dataclass(frozen=True)
class Exported:
    """What was written: the names of the tensor files, and the figures of every weight."""

    files: list[str]
    report: MergeReport


_Files = Mapping[str, Source]


class _Origin(Protocol):
    """Where the rows of a model's weights come from."""

    def trained(self, weight: _Weight) -> list[WeightRows]:
        """W0 as it was in training, in the plain checkpoint's orientation; the matrices of a packed stack apart."""

    def integers(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that is no float, whole."""


class _InMemory:
    def trained(self, weight: _Weight) -> list[WeightRows]:
        held = weight.holder
        if isinstance(held, PackedStack):
            return [packed_rows(matrix, held.transposed) for matrix in held]
        return [packed_rows(held, weight.transposed) if isinstance(held, PackedWeight) else DenseRows(held)]

    def integers(self, name: str, tensor: Tensor) -> Tensor:
        return tensor


class _OnDisk:
    """Of an empty model that stands for a checkpoint: what `load_quantized` would have made of each tensor."""

    def __init__(self, model: nn.Module, files: _Files, config: QuantConfig, dtype: torch.dtype) -> None:
        self._files, self._config, self._dtype = files, config, dtype
        self._slots = {id(slot.weight): slot for slot in slots(model, config)}

    def trained(self, weight: _Weight) -> list[WeightRows]:
        stored = self._files[weight.name]
        slot = self._slots.get(id(weight.holder))
        if slot is None:
            return [StoredRows(stored, self._dtype)]
        matrices = to_be_packed(stored, slot, self._config, self._dtype)
        return [RepackedRows(matrix, slot.transposed) for matrix in matrices]

    def integers(self, name: str, tensor: Tensor) -> Tensor:
        stored = self._files[name]
        return stored.rows(0, stored.shape[0] if stored.shape else 1)


@dataclass(frozen=True)
class _Weight:
    """A tensor of the plain checkpoint. `holder`: what holds it in the model, equal for tied ones.

    transposed: the holder was turned round to be packed; the delta is in the checkpoint's orientation.
    """

    name: str
    holder: Any
    delta: Delta | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """In the plain checkpoint."""
        held = tuple(self.holder.shape)
        return (*held[:-2], held[-1], held[-2]) if self.transposed else held


def _plain_weights(model: nn.Module) -> Iterator[_Weight]:
    """Every tensor that the model would have without adapters and packing, under the name that it would have."""

    def visit(module: nn.Module, prefix: str) -> Iterator[_Weight]:
        if isinstance(module, LoraLayer):
            turned = getattr(module.base_layer, "transposed", False)
            delta = module.delta.transposed if turned else module.delta
            yield _Weight(f"{prefix}weight", module.base_layer.weight, delta, turned)
            yield from (weight for weight in visit(module.base_layer, prefix) if weight.name != f"{prefix}weight")
            return
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield _Weight(f"{prefix}{key}", parameter)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield _Weight(f"{prefix}{key}", buffer)
        for key, child in module._modules.items():
            if isinstance(child, PackedStack):
                yield _Weight(f"{prefix}{key}", child)
            elif isinstance(child, PackedWeight):
                yield _Weight(f"{prefix}{key}", child, transposed=getattr(module, "transposed", False))
            elif child is not None:
                yield from visit(child, f"{prefix}{key}.")

    return visit(model, "")


def _weights_to_write(model: nn.Module) -> list[_Weight]:
    """Tied ones once. TargetError if one of a tied pair is adapted alone."""
    chosen: list[_Weight] = []
    first: dict[int, _Weight] = {}
    aliases = hub.tied_names(model)
    for weight in _plain_weights(model):
        other = first.setdefault(id(weight.holder), weight)
        # Only what the config ties is found again by who loads the checkpoint; other shared tensors are written twice.
        if other is weight or not {weight.name, other.name} & aliases:
            chosen.append(weight)
        elif weight.delta is not None or other.delta is not None:
            raise TargetError(
                f"{weight.name} and {other.name} are one weight, and an adapter is on one of them: a merged checkpoint "
                f"would change both; save the adapter instead, or train without it"
            )
    return chosen


@dataclass
class _Plan:
    """The tensors to write, and the figures that writing them fills in."""

    base: str
    dtype: torch.dtype
    tensors: dict[str, PlannedTensor] = field(default_factory=dict)
    figures: list[TensorFigures] = field(default_factory=list)

    def add(self, weight: _Weight, origin: _Origin, files: _Files) -> None:
        if isinstance(weight.holder, Tensor) and not weight.holder.is_floating_point():
            tensor = weight.holder
            whole = functools.partial(origin.integers, weight.name, tensor)
            self.tensors[weight.name] = PlannedTensor(tuple(tensor.shape), tensor.dtype, lambda: [whole()])
            return
        trained = origin.trained(weight)
        stored = files.get(weight.name)
        original = _as_stored(stored, trained) if stored is not None and stored.shape == weight.shape else None
        if self.base == ORIGINAL and original is None:
            raise CheckpointError(f"base='original' needs the checkpoint's own {weight.name}, which is not at hand")
        is_packed = isinstance(trained[0], (PackedRows, TransposedRows, RepackedRows))
        other = original if is_packed else None
        if self.base == ORIGINAL and original is not None:
            chosen, other = original, trained if is_packed else None
        else:
            chosen = trained
        write = _Writing(chosen, other, weight.delta, weight.name, self)
        self.tensors[weight.name] = PlannedTensor(weight.shape, self.dtype, write.slices)

    def report(self) -> MergeReport:
        name = next(name for name, dtype in FLOAT_DTYPES.items() if dtype == self.dtype)
        return MergeReport(self.base, name, tuple(self.figures))


def _as_stored(stored: Source, trained: list[WeightRows]) -> list[WeightRows]:
    """A tensor in the files in the same pieces as what was trained: whole, or the matrices of a stack."""
    if len(trained[0].shape) == len(stored.shape):
        return [StoredRows(stored)]
    return [StoredRows(stored.part(index)) for index in range(stored.shape[0])]


@dataclass(frozen=True)
class _Writing:
    """How one tensor is made: the base that is written into, the other one to measure packing by, the update.

    Both bases come as one piece, or as the matrices of a stack, which has no update.
    """

    chosen: list[WeightRows]
    other: list[WeightRows] | None
    delta: Delta | None
    name: str
    plan: _Plan

    @torch.no_grad()
    def slices(self) -> Iterator[Tensor]:
        figures = TensorFigures(self.name, values=0)
        if self.delta is not None:
            figures.update = self.delta.squared_norm()
        others = [None] * len(self.chosen) if self.other is None else self.other
        for chosen, other in zip(self.chosen, others, strict=True):
            steps = [chosen.step, 1 if other is None else other.step]
            step = common_step(*steps, 1 if self.delta is None else Delta.TILE_ROWS)
            for start, stop in slice_starts(chosen.shape, step, SLICE_BYTES):
                rows = chosen.rows(start, stop)
                yield self._written(rows, None if other is None else other.rows(start, stop), start, figures)
        self.plan.figures.append(figures)

    def _written(self, rows: Tensor, other: Tensor | None, start: int, figures: TensorFigures) -> Tensor:
        figures.values += rows.numel()
        figures.add_weight(rows)
        if other is not None:
            figures.add_quantization(rows, other)
        without_update = None
        if self.delta is not None:
            without_update = rows.to(self.plan.dtype, copy=True)
            self.delta.add_to_(rows, start)
        written = cast_finite(rows, self.plan.dtype, self.name)
        figures.add_written(rows, written, without_update)
        return written


def _check_options(base: str, dtype: torch.dtype, max_shard_bytes: int) -> None:
    require(base in BASES, f"base must be {' or '.join(BASES)}", base)
    if dtype not in FLOAT_DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {dtype}")
    require(is_count(max_shard_bytes, 1), "max_shard_bytes must be an integer of at least 1", max_shard_bytes)


def _write(model: nn.Module, source: Path | None, folder: Path, plan: _Plan, shard: int, overwrite: bool) -> Exported:
    check_apart(folder, source)
    with new_folder(folder, overwrite) as temporary:
        check_space(folder, sum(tensor.bytes for tensor in plan.tensors.values()))
        files = write_sharded(temporary, plan.tensors, shard)
        hub.save_companions(model, source, temporary, plan.dtype)
        report = plan.report()
        write_json(temporary / REPORT_FILE, report.to_json())
    return Exported(files, report)


def export_merged(
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype = torch.float16,
    *,
    base: str = DEQUANTIZED,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Exported:
    """Writes W0 + (alpha / r) B A of every layer, summed in fp32 and cast, as safetensors shards.

    base: `dequantized` writes into W0 as it was packed and trained on; `original` into the weights of the checkpoint
    that the model was loaded from, read from there. The folder also gets config, generation config, tokenizer, chat
    template and `merge_report.json`, and loads with `AutoModelForCausalLM.from_pretrained`. A slice of a tensor is
    made at a time; the model is not changed, and need not be merged. Raises QuantizationError, naming the tensor, for
    values above `dtype`'s range (fp16: 65,504), CheckpointError for too little room on the disk, a checkpoint that is
    not there, or a folder with something in it unless `overwrite`; what was there before is then untouched.
    """
    _check_options(base, dtype, max_shard_bytes)
    if getattr(model, "config", None) is None:
        raise ConfigError(f"export needs a transformers model with a config; got a {type(model).__name__}")
    source = hub.source_folder(model)
    stored = TensorFiles.of(source)
    if base == ORIGINAL and stored is None:
        raise CheckpointError("base='original' needs the checkpoint that the model was loaded from; it has none")
    weights = _weights_to_write(model)
    shapes = {weight.name: weight.shape for weight in weights}
    files = {} if stored is None else model_tensors(model, shapes, stored.stored).tensors
    plan = _Plan(base, dtype)
    for weight in weights:
        plan.add(weight, _InMemory(), files)
    return _write(model, source, Path(folder), plan, max_shard_bytes, overwrite)


def merge_checkpoint(
    path_or_id: str | Path,
    adapter: str | Path,
    folder: str | Path,
    config: QuantConfig | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    base: str = DEQUANTIZED,
    load_dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Exported:
    """What `export_merged` writes of a model loaded with `config` and the adapter, bit for bit, without loading it.

    Rows are read, packed and unpacked again as training had them (load_dtype: the dtype that it was loaded in; only
    `base='original'` leaves that out), merged and written, so memory does not grow with the model. Raises what
    `load_quantized`, `load_adapter_` and `export_merged` raise.
    """
    _check_options(base, dtype, max_shard_bytes)
    source = hub.resolve(path_or_id)
    check_apart(Path(folder), source, Path(adapter))
    model: Any = hub.empty_model(hub.read_config(source), load_dtype)
    hub.tie(model)
    files = fitting(model, TensorFiles(source))
    origin = _OnDisk(model, files, config or QuantConfig(), load_dtype)
    load_adapter_(model, adapter)
    hub.read_generation_config_(model, source)
    plan = _Plan(base, dtype)
    for weight in _weights_to_write(model):
        plan.add(weight, origin, files)
    return _write(model, source, Path(folder), plan, max_shard_bytes, overwrite)
