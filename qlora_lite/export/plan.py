"""What an export writes: every tensor of the plain checkpoint, where its rows come from, and what writing it cost.

W0 comes from a model in memory or from a checkpoint on disk, packed or not; all of that is behind `ModelWeights`.
Nothing is read or made before the tensor's turn to be written, and then some rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from qlora_lite.checkpoints.checkpoint import Checkpoint
from qlora_lite.checkpoints.lazy_tensors import LazyTensor, read_slices
from qlora_lite.checkpoints.safetensors_write import PlannedTensor
from qlora_lite.checks import FLOAT_DTYPES
from qlora_lite.compute.host_memory import HeapTrimmer, release_freed_pages
from qlora_lite.compute.weight_update import Delta, Replaced, StackDelta, Update
from qlora_lite.errors import CheckpointError
from qlora_lite.export.lazy_model import LazyWeights
from qlora_lite.export.plain_weights import PlainWeight, weights_to_write
from qlora_lite.export.report import MergeReport, TensorFigures
from qlora_lite.export.verify import DEQUANTIZED, ORIGINAL, ModelsToCompare
from qlora_lite.export.weight_rows import (
    DenseRows,
    MergeInputs,
    PackedRows,
    RepackedRows,
    StoredRows,
    TransposedRows,
    WeightRows,
    aligned_slices,
    merged_rows,
    packed_rows,
    packing_ahead,
    whole_slices,
)
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.kinds import StackKind
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.lora.peft.auxiliary import stored_replacements_
from qlora_lite.lora.peft.experts import stack_key_names, unflatten_A, unflatten_B
from qlora_lite.lora.peft.keys import adapter_tensors, peft_key
from qlora_lite.quantization.experts import PackedStack
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.quantization.quantize_model import WeightToPack

# Of fp32 values at once: what stays in the caches while it is summed, cast and measured.
SLICE_BYTES = 2 << 20


class ModelWeights(Protocol):
    """Where the rows of a model's weights come from."""

    def trained(self, weight: PlainWeight) -> list[WeightRows]:
        """W0 as it was in training, in the plain checkpoint's orientation; a packed or adapted stack by matrices."""

    def delta(self, weight: PlainWeight) -> Update:
        """The update of a weight that has one."""

    def integers(self, weight: PlainWeight) -> Tensor:
        """A tensor that is no float, whole."""


class ModelInMemory:
    """Of a model in memory."""

    def trained(self, weight: PlainWeight) -> list[WeightRows]:
        held = weight.holder
        if isinstance(held, PackedStack):
            return [packed_rows(matrix, held.transposed) for matrix in held]
        if isinstance(weight.delta, StackDelta):
            return [DenseRows(matrix) for matrix in held]
        return [packed_rows(held, weight.transposed) if isinstance(held, PackedWeight) else DenseRows(held)]

    def delta(self, weight: PlainWeight) -> Update:
        assert weight.delta is not None
        return weight.delta

    def integers(self, weight: PlainWeight) -> Tensor:
        held: Tensor = weight.holder
        return held


class ModelOnDisk:
    """Of an empty model that stands for a checkpoint: what `load_quantized` would have made of each tensor.

    weights_to_pack: what the checkpoint packs of the model, before adapters were put onto it.
    deltas: those of the adapter on disk, by the weights' names (`lazy_updates_`).
    """

    def __init__(
        self,
        weights_to_pack: list[WeightToPack],
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        deltas: Mapping[str, Callable[[], Update]],
    ) -> None:
        self._checkpoint, self._dtype, self._deltas = checkpoint, dtype, deltas
        self._to_pack = {id(to_pack.weight): to_pack for to_pack in weights_to_pack}

    def _name(self, weight: PlainWeight) -> str:
        name = weight.name_in(self._checkpoint.tensors)
        assert name is not None  # the checkpoint fits the model
        return name

    def trained(self, weight: PlainWeight) -> list[WeightRows]:
        name, to_pack = self._name(weight), self._to_pack.get(id(weight.holder))
        if to_pack is None:
            stored = self._checkpoint.plain(name)
            return [StoredRows(piece, self._dtype) for piece in _pieces(stored, isinstance(weight.delta, StackDelta))]
        sources = self._checkpoint.packed_weights(name, to_pack, self._dtype)
        return [RepackedRows(source, to_pack.transposed) for source in sources]

    def delta(self, weight: PlainWeight) -> Update:
        return self._deltas[weight.name]()

    def integers(self, weight: PlainWeight) -> Tensor:
        stored = self._checkpoint.plain(self._name(weight))
        return stored.rows(0, stored.shape[0] if stored.shape else 1)


def lazy_updates_(model: nn.Module, folder: str | Path) -> dict[str, Callable[[], Update]]:
    """The updates that `load_adapter_` gave a model on meta, by the weights' names, each read again when asked for.

    The layers let go of their values, so an adapter takes no memory but for the layer at hand.
    """
    stored = adapter_tensors(Path(folder))

    def delta(layer: LoraLayer, keys: dict[str, str]) -> Update:
        values = {part: stored[key].read() for part, key in keys.items()}
        lora_A, lora_B = values["lora_A"], values["lora_B"]
        if isinstance(layer.kind, StackKind):
            experts = layer.lora_A.shape[0]
            lora_A, lora_B = unflatten_A(lora_A, experts), unflatten_B(lora_B, experts)
        else:
            lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)
        return layer.variant.updated(layer.kind.delta(lora_A, lora_B, layer.scaling), values)

    def bias_delta(layer: LoraLayer, keys: dict[str, str]) -> Update:
        update = layer.variant.bias_update(layer.scaling, {part: stored[key].read() for part, key in keys.items()})
        assert update is not None
        return update

    found: dict[str, Callable[[], Update]] = {**stored_replacements_(model, stored)}
    layers = lora_layers(model)
    key_names = stack_key_names(model, [name for name, layer in layers.items() if isinstance(layer.kind, StackKind)])
    for name, layer in layers.items():
        keys = {part: peft_key(key_names.get(name, name), layer.kind, part) for part in layer.lora_parameters}
        weight = name if isinstance(layer.kind, StackKind) else f"{name}.weight"
        found[weight] = functools.partial(delta, layer, keys)
        if layer.variant.added_bias is not None:
            found[f"{name}.bias"] = functools.partial(bias_delta, layer, keys)
        layer.to("meta")
    release_freed_pages()
    return found


class _Made(Mapping[str, Delta]):
    """Updates by name, each made or read whenever it is asked for; of single matrices."""

    def __init__(self, makers: Mapping[str, Callable[[], Update]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Delta:
        made = self._makers[name]()
        assert isinstance(made, Delta)  # what replaces a weight has no low rank, and is never applied apart from it
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass
class ExportPlan:
    """The tensors to write, and the figures that writing them fills in.

    untied: whether weights that are tied in the model are two in the export, since an adapter is on one of them.
    holes: looked at after each tensor, so that freed pages of many sizes do not pile up.
    """

    base: str
    dtype: torch.dtype
    untied: bool
    tensors: dict[str, PlannedTensor] = field(default_factory=dict)
    figures: list[TensorFigures] = field(default_factory=list)
    sources: list[MergeInputs] = field(default_factory=list)
    holes: HeapTrimmer = field(default_factory=HeapTrimmer)

    @classmethod
    def of(
        cls, model: nn.Module, base: str, dtype: torch.dtype, origin: ModelWeights, originals: Mapping[str, LazyTensor]
    ) -> ExportPlan:
        """The tensors of the model, from their origin and from the checkpoint's own (full-precision) tensors.

        CheckpointError if the base is `original` and one of those is not at hand.
        """
        weights, untied = weights_to_write(model)
        plan = cls(base, dtype, untied)
        for weight in weights:
            plan._add(weight, origin, originals)
        return plan

    def _add(self, weight: PlainWeight, origin: ModelWeights, originals: Mapping[str, LazyTensor]) -> None:
        if isinstance(weight.holder, Tensor) and not weight.holder.is_floating_point():
            whole = functools.partial(origin.integers, weight)
            self.tensors[weight.name] = PlannedTensor(weight.shape, weight.holder.dtype, lambda: [whole()])
            return
        trained = origin.trained(weight)
        stored = originals.get(weight.name_in(originals) or weight.name)
        original = _as_stored(stored, trained) if stored is not None and stored.shape == weight.shape else None
        if self.base == ORIGINAL and original is None:
            raise CheckpointError(f"base='original' needs the checkpoint's own {weight.name}, which is not at hand")
        is_packed = isinstance(trained[0], (PackedRows, TransposedRows, RepackedRows))
        chosen, other = trained, original if is_packed else None
        if self.base == ORIGINAL and original is not None:
            chosen, other = original, trained if is_packed else None
        delta = None if weight.delta is None else functools.partial(origin.delta, weight)
        # A kernel's update is not applied apart.
        low_rank = weight.delta is None or (weight.delta.low_rank and len(weight.shape) == 2)
        self.sources.append(MergeInputs(weight.name, trained, original, delta, low_rank))
        write = _Writing(chosen, other, delta, weight.name, self)
        self.tensors[weight.name] = PlannedTensor(weight.shape, self.dtype, write.slices)

    def packing_ahead(self) -> AbstractContextManager[None]:
        """Within the block, a weight that is packed again for the sake of its figures or its values is so in time."""
        weights = [rows for source in self.sources for rows in source.trained if isinstance(rows, RepackedRows)]
        return packing_ahead(weights) if weights else nullcontext()

    def compared(self, written: Mapping[str, LazyTensor]) -> ModelsToCompare:
        """The models that the export is verified against; the written one is read back from the files."""
        rest = {name: tensor.slices for name, tensor in self.tensors.items()}  # integers: the same in all
        base = LazyWeights(rest | {source.name: functools.partial(source.base, SLICE_BYTES) for source in self.sources})
        apart = {source.name: source.delta for source in self.sources if source.delta is not None and source.low_rank}
        whole = {
            source.name: functools.partial(source.merged, False, torch.float32, SLICE_BYTES)
            for source in self.sources
            if not source.low_rank
        }
        merged = {self.base: LazyWeights({name: _read(stored) for name, stored in written.items()})}
        missing: dict[str, str] = {}
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
            merged[other] = LazyWeights(rest | made)
        return ModelsToCompare(base, LazyWeights({**base.tensors, **whole}, _Made(apart)), merged, missing)

    def report(self) -> MergeReport:
        name = next(name for name, dtype in FLOAT_DTYPES.items() if dtype == self.dtype)
        place = {
            tensor: number for number, tensor in enumerate(self.tensors)
        }  # shards are filled in an order of theirs
        return MergeReport(self.base, name, tuple(sorted(self.figures, key=lambda figures: place[figures.name])))


def _as_stored(stored: LazyTensor, trained: list[WeightRows]) -> list[WeightRows]:
    """A tensor in the files in the same pieces as what was trained: whole, or the matrices of a stack."""
    return [StoredRows(piece) for piece in _pieces(stored, len(trained[0].shape) < len(stored.shape))]


def _pieces(stored: LazyTensor, stacked: bool) -> list[LazyTensor]:
    """A tensor whole, or its matrices."""
    return [stored.select(index) for index in range(stored.shape[0])] if stacked else [stored]


def _read(stored: LazyTensor) -> Callable[[], Iterator[Tensor]]:
    return lambda: (rows for _, rows in read_slices(stored, SLICE_BYTES))


@dataclass(frozen=True)
class _Writing:
    """How one tensor is made: the base that is written into, the other one to measure packing by, the update.

    Both bases come as one piece, or as the matrices of a stack, of which each has an update or none.
    """

    chosen: list[WeightRows]
    other: list[WeightRows] | None
    delta: Callable[[], Update] | None
    name: str
    plan: ExportPlan

    @torch.no_grad()
    def slices(self) -> Iterator[Tensor]:
        figures = TensorFigures(self.name, values=0)
        update = None if self.delta is None else self.delta()
        if update is not None:
            update = update.prepared(lambda: whole_slices(self.chosen, update, SLICE_BYTES))
            if not isinstance(update, Replaced) and update.additive:
                figures.update = update.squared_norm()
            else:
                figures.update = 0.0  # summed up slice by slice
        forms = zip(self.chosen) if self.other is None else zip(self.chosen, self.other, strict=True)
        for start, (rows, *other), delta in aligned_slices(forms, update, SLICE_BYTES):
            yield self._written(rows, other[0] if other else None, start, delta, figures)
        self.plan.figures.append(figures)
        self.plan.holes.check()

    def _written(
        self, rows: Tensor, other: Tensor | None, start: int, delta: Update | None, figures: TensorFigures
    ) -> Tensor:
        figures.values += rows.numel()
        figures.add_weight(rows)
        if other is not None:
            figures.add_quantization(rows, other)
        without_update = None if delta is None else rows.to(self.plan.dtype, copy=True)
        before = None if delta is None or delta.additive else rows.clone()
        written = merged_rows(rows, start, delta, self.plan.dtype, self.name)
        if before is not None:
            figures.add_update(before.sub_(rows))
        figures.add_written(rows, written, without_update)
        return written
