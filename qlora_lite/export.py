"""Out: what was trained as an ordinary checkpoint, written a few rows at a time, with what that cost in numbers.

`export_merged` takes a model in memory, `merge_checkpoint` a checkpoint and an adapter on disk, of which no tensor is
ever held whole. Both plan every tensor first (weight_rows.py says where its rows come from), then write it:
W0 + (alpha / r) B A, summed in fp32 and cast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_lite import hub
from qlora_lite.adapter_files import load_adapter_
from qlora_lite.config import FLOAT_DTYPES, QuantConfig, is_count, require
from qlora_lite.data import TokenizedExample
from qlora_lite.delta import Delta
from qlora_lite.errors import CheckpointError, ConfigError, TargetError
from qlora_lite.load import check_fits
from qlora_lite.lora import LoraLayer
from qlora_lite.merge_report import MergeReport, TensorFigures
from qlora_lite.quantize import PackedWeight
from qlora_lite.quantize_base import slots
from qlora_lite.storage import PlannedTensor, check_apart, check_space, new_folder, write_json, write_sharded
from qlora_lite.streamed import Weights
from qlora_lite.tensor_files import StoredTensor, TensorFiles
from qlora_lite.verify import BASES, DEQUANTIZED, ORIGINAL, Compared, Verification, check_examples, compare
from qlora_lite.weight_rows import (
    DenseRows,
    PackedRows,
    RepackedRows,
    Sources,
    StoredRows,
    ToBePacked,
    WeightRows,
    common_step,
    merged_rows,
    slice_starts,
)

DEFAULT_SHARD_BYTES = 5 * 10**9
# Of fp32 values at once: what stays in the caches while it is summed, cast and measured.
SLICE_BYTES = 4 << 20
REPORT_FILE = "merge_report.json"


@dataclass(frozen=True)
class Exported:
    """What was written: the names of the tensor files, the figures of every weight, what comparing logits gave."""

    files: list[str]
    report: MergeReport
    verification: Verification | None = None


class _Origin(Protocol):
    """Where the rows of a model's weights come from."""

    def trained(self, name: str, weight: Any) -> WeightRows:
        """W0 as the adapters saw it in training."""

    def integers(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that is no float, whole."""


class _InMemory:
    def trained(self, name: str, weight: Any) -> WeightRows:
        return PackedRows(weight) if isinstance(weight, PackedWeight) else DenseRows(weight)

    def integers(self, name: str, tensor: Tensor) -> Tensor:
        return tensor


class _OnDisk:
    """Of an empty model that stands for a checkpoint: what `load_quantized` would have made of each tensor."""

    def __init__(self, model: nn.Module, files: TensorFiles, config: QuantConfig, dtype: torch.dtype) -> None:
        self._files, self._config, self._dtype = files, config, dtype
        self._formats = {id(slot.weight): slot.format for slot in slots(model, config)}

    def trained(self, name: str, weight: Any) -> WeightRows:
        stored = self._files.stored[name]
        if id(weight) in self._formats:
            return RepackedRows(ToBePacked(stored, self._config, self._formats[id(weight)], self._dtype))
        return StoredRows(stored, self._dtype)

    def integers(self, name: str, tensor: Tensor) -> Tensor:
        return self._files.stored[name].read()


@dataclass(frozen=True)
class _Weight:
    """A tensor of the plain checkpoint. `holder`: what holds it in the model, equal for tied ones."""

    name: str
    holder: Any
    delta: Delta | None = None


def _plain_weights(model: nn.Module) -> Iterator[_Weight]:
    """Every tensor that the model would have without adapters and packing, under the name that it would have."""

    def visit(module: nn.Module, prefix: str) -> Iterator[_Weight]:
        if isinstance(module, LoraLayer):
            yield _Weight(f"{prefix}weight", module.base_layer.weight, module.delta)
            yield from (weight for weight in visit(module.base_layer, prefix) if weight.name != f"{prefix}weight")
            return
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield _Weight(f"{prefix}{key}", parameter)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield _Weight(f"{prefix}{key}", buffer)
        for key, child in module._modules.items():
            if isinstance(child, PackedWeight):
                yield _Weight(f"{prefix}{key}", child)
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
    sources: list[Sources] = field(default_factory=list)

    def add(self, weight: _Weight, origin: _Origin, files: TensorFiles | None) -> None:
        if isinstance(weight.holder, Tensor) and not weight.holder.is_floating_point():
            tensor = weight.holder
            whole = functools.partial(origin.integers, weight.name, tensor)
            self.tensors[weight.name] = PlannedTensor(tuple(tensor.shape), tensor.dtype, lambda: [whole()])
            return
        trained = origin.trained(weight.name, weight.holder)
        stored = None if files is None else files.stored.get(weight.name)
        chosen: WeightRows
        original: WeightRows | None = (
            StoredRows(stored) if stored is not None and stored.shape == trained.shape else None
        )
        if self.base == ORIGINAL and original is None:
            raise CheckpointError(f"base='original' needs the checkpoint's own {weight.name}, which is not at hand")
        is_packed = isinstance(trained, (PackedRows, RepackedRows))
        other = original if is_packed else None
        if self.base == ORIGINAL and original is not None:
            chosen, other = original, trained if is_packed else None
        else:
            chosen = trained
        self.sources.append(Sources(weight.name, trained, original, weight.delta))
        write = _Writing(chosen, other, weight.delta, weight.name, self)
        self.tensors[weight.name] = PlannedTensor(trained.shape, self.dtype, write.slices)

    def compared(self, written: TensorFiles) -> Compared:
        """The models that the export is verified against; the written one is read back from the files."""
        rest = {name: tensor.slices for name, tensor in self.tensors.items()}  # integers: the same in all
        base = Weights(rest | {source.name: functools.partial(source.base, SLICE_BYTES) for source in self.sources})
        deltas = {source.name: source.delta for source in self.sources if source.delta is not None}
        merged, missing = {self.base: Weights({name: _read(stored) for name, stored in written.stored.items()})}, {}
        other = ORIGINAL if self.base == DEQUANTIZED else DEQUANTIZED
        lost = [source.name for source in self.sources if source.original is None]
        if other == ORIGINAL and lost:
            missing[ORIGINAL] = f"no checkpoint with its {lost[0]} is at hand"
        else:
            from_original = other == ORIGINAL
            made = {
                source.name: functools.partial(source.merged, from_original, self.dtype, SLICE_BYTES)
                for source in self.sources
            }
            merged[other] = Weights(rest | made)
        return Compared(base, Weights(base.tensors, deltas), merged, missing)

    def report(self) -> MergeReport:
        name = next(name for name, dtype in FLOAT_DTYPES.items() if dtype == self.dtype)
        return MergeReport(self.base, name, tuple(self.figures))


@dataclass(frozen=True)
class _Writing:
    """How one tensor is made: the base that is written into, the other one to measure packing by, the update."""

    chosen: WeightRows
    other: WeightRows | None
    delta: Delta | None
    name: str
    plan: _Plan

    @torch.no_grad()
    def slices(self) -> Iterator[Tensor]:
        figures = TensorFigures(self.name, values=0)
        steps = [self.chosen.step, 1 if self.other is None else self.other.step]
        step = common_step(*steps, 1 if self.delta is None else Delta.TILE_ROWS)
        if self.delta is not None:
            figures.update = self.delta.squared_norm()
        for start, stop in slice_starts(self.chosen.shape, step, SLICE_BYTES):
            yield self._slice(start, stop, figures)
        self.plan.figures.append(figures)

    def _slice(self, start: int, stop: int, figures: TensorFigures) -> Tensor:
        rows = self.chosen.rows(start, stop)
        figures.values += rows.numel()
        figures.add_weight(rows)
        if self.other is not None:
            figures.add_quantization(rows, self.other.rows(start, stop))
        without_update = None
        if self.delta is not None:
            without_update = rows.to(self.plan.dtype, copy=True)
        written = merged_rows(rows, start, self.delta, self.plan.dtype, self.name)
        figures.add_written(rows, written, without_update)
        return written


def _check_options(base: str, dtype: torch.dtype, max_shard_bytes: int) -> None:
    require(base in BASES, f"base must be {' or '.join(BASES)}", base)
    if dtype not in FLOAT_DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {dtype}")
    require(is_count(max_shard_bytes, 1), "max_shard_bytes must be an integer of at least 1", max_shard_bytes)


def _read(stored: StoredTensor) -> Callable[[], Iterator[Tensor]]:
    return lambda: (rows for _, rows in stored.slices(SLICE_BYTES))


def _verified(folder: Path, plan: _Plan, examples: Sequence[TokenizedExample]) -> Verification:
    """What transformers would build from the folder, on the folder's tensors, beside the model that was trained."""
    written = TensorFiles(folder)
    empty: Any = hub.empty_model(hub.read_config(folder), torch.float32)
    hub.tie(empty)
    check_fits(empty, written)
    return compare(empty, plan.compared(written), examples, plan.base)


def _write(
    model: Any,
    source: Path | None,
    folder: Path,
    plan: _Plan,
    shard: int,
    overwrite: bool,
    examples: Sequence[TokenizedExample] | None,
) -> Exported:
    check_apart(folder, source)
    if examples is not None:
        check_examples(examples, model.config, hub.vocabulary(model))
    with new_folder(folder, overwrite) as temporary:
        check_space(folder, sum(tensor.bytes for tensor in plan.tensors.values()))
        files = write_sharded(temporary, plan.tensors, shard)
        hub.save_companions(model, source, temporary, plan.dtype)
        report = plan.report()
        found = None if examples is None else _verified(temporary, plan, examples)
        verify = {} if found is None else {"verify": found.to_json()}
        write_json(temporary / REPORT_FILE, report.to_json() | verify)
    return Exported(files, report, found)


def export_merged(
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype = torch.float16,
    *,
    base: str = DEQUANTIZED,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    verify: Sequence[TokenizedExample] | None = None,
) -> Exported:
    """Writes W0 + (alpha / r) B A of every layer, summed in fp32 and cast, as safetensors shards.

    base: `dequantized` writes into W0 as it was packed and trained on; `original` into the weights of the checkpoint
    that the model was loaded from, read from there. The folder also gets config, generation config, tokenizer, chat
    template and `merge_report.json`, and loads with `AutoModelForCausalLM.from_pretrained`. A slice of a tensor is
    made at a time; the model is not changed, and need not be merged.
    verify: held-out examples (`data.tokenize_all`) on which this export, read back from its files, and the merge into
    the other base are compared with the adapter model (verify.py) before the folder gets its name.
    Raises QuantizationError, naming the tensor, for values above `dtype`'s range (fp16: 65,504), CheckpointError for
    too little room on the disk, a checkpoint that is not there, or a folder with something in it unless `overwrite`;
    what was there before is then untouched. ConfigError for examples that do not belong to the model.
    """
    _check_options(base, dtype, max_shard_bytes)
    if getattr(model, "config", None) is None:
        raise ConfigError(f"export needs a transformers model with a config; got a {type(model).__name__}")
    source = hub.source_folder(model)
    files = TensorFiles.of(source)
    if base == ORIGINAL and files is None:
        raise CheckpointError("base='original' needs the checkpoint that the model was loaded from; it has none")
    plan = _Plan(base, dtype)
    for weight in _weights_to_write(model):
        plan.add(weight, _InMemory(), files)
    return _write(model, source, Path(folder), plan, max_shard_bytes, overwrite, verify)


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
    verify: Sequence[TokenizedExample] | None = None,
) -> Exported:
    """What `export_merged` writes of a model loaded with `config` and the adapter, bit for bit, without loading it.

    Rows are read, packed and unpacked again as training had them (load_dtype: the dtype that it was loaded in; only
    `base='original'` leaves that out), merged and written, so memory does not grow with the model. verify: as there.
    Raises what `load_quantized`, `load_adapter_` and `export_merged` raise.
    """
    _check_options(base, dtype, max_shard_bytes)
    source = hub.resolve(path_or_id)
    check_apart(Path(folder), source, Path(adapter))
    files = TensorFiles(source)
    model: Any = hub.empty_model(hub.read_config(source), load_dtype)
    hub.tie(model)
    check_fits(model, files)
    origin = _OnDisk(model, files, config or QuantConfig(), load_dtype)
    load_adapter_(model, adapter)
    hub.read_generation_config_(model, source)
    plan = _Plan(base, dtype)
    for weight in _weights_to_write(model):
        plan.add(weight, origin, files)
    return _write(model, source, Path(folder), plan, max_shard_bytes, overwrite, verify)
