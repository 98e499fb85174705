"""Plans an export: every tensor of the plain checkpoint, how its rows are computed, and the figures of the report.

The step of a weight on its way out between model_weights.py, which gives W0 and the update, and merged.py, which writes
the plan. Nothing is read or computed before a tensor is written, and then some rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qlora_lite.checkpoints.lazy_tensors import LazyTensor, read_slices
from qlora_lite.checkpoints.safetensors_write import PlannedTensor
from qlora_lite.checks import FLOAT_DTYPES
from qlora_lite.compute.host_memory import HeapTrimmer
from qlora_lite.compute.weight_update import Delta, Replacement, Update
from qlora_lite.errors import CheckpointError
from qlora_lite.export.lazy_model import LazyWeights
from qlora_lite.export.model_weights import ModelWeights, as_stored
from qlora_lite.export.plain_weights import PlainWeight, weights_to_write
from qlora_lite.export.report import MergeReport, TensorFigures
from qlora_lite.export.verify import DEQUANTIZED, ORIGINAL, ModelsToCompare
from qlora_lite.export.weight_rows import (
    MergeInputs,
    PackedRows,
    RepackedRows,
    TransposedRows,
    WeightRows,
    aligned_slices,
    merged_rows,
    packing_ahead,
    whole_slices,
)

# Computed at once, in fp32; small enough to stay in the caches while it is summed, cast and measured.
SLICE_BYTES = 2 << 20


class _LazyDeltas(Mapping[str, Delta]):
    """Low-rank updates of matrices by name, each computed or read on every access."""

    def __init__(self, makers: Mapping[str, Callable[[], Update]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Delta:
        update = self._makers[name]()
        assert isinstance(update, Delta)  # the other updates are not of low rank
        return update

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass
class ExportPlan:
    """The tensors to write, and the figures that are measured while they are written.

    untied: whether tied weights are written apart, because an adapter is on one of them. merges: the inputs of every
    floating tensor. holes: checked after each tensor, so that freed pages do not accumulate.
    """

    base: str
    dtype: torch.dtype
    untied: bool
    tensors: dict[str, PlannedTensor] = field(default_factory=dict)
    figures: list[TensorFigures] = field(default_factory=list)
    merges: list[MergeInputs] = field(default_factory=list)
    holes: HeapTrimmer = field(default_factory=HeapTrimmer)

    @classmethod
    def of(
        cls, model: nn.Module, base: str, dtype: torch.dtype, held: ModelWeights, originals: Mapping[str, LazyTensor]
    ) -> ExportPlan:
        """Plans all tensors of a model.

        held: the model's weights as they were in training. originals: the checkpoint's tensors in full precision.
        Raises CheckpointError if the base is `original` and one of these is missing.
        """
        weights, untied = weights_to_write(model)
        plan = cls(base, dtype, untied)
        for weight in weights:
            plan._add(weight, held, originals)
        return plan

    def _add(self, weight: PlainWeight, held: ModelWeights, originals: Mapping[str, LazyTensor]) -> None:
        if isinstance(weight.holder, Tensor) and not weight.holder.is_floating_point():
            whole = functools.partial(held.integers, weight)
            self.tensors[weight.name] = PlannedTensor(weight.shape, weight.holder.dtype, lambda: [whole()])
            return
        trained = held.trained(weight)
        stored = originals.get(weight.name_in(originals) or weight.name)
        original = as_stored(stored, trained) if stored is not None and stored.shape == weight.shape else None
        if self.base == ORIGINAL and original is None:
            raise CheckpointError(f"base='original' needs {weight.name} in full precision, which the checkpoint lacks")
        is_packed = isinstance(trained[0], (PackedRows, TransposedRows, RepackedRows))
        chosen, other = trained, original if is_packed else None
        if self.base == ORIGINAL and original is not None:
            chosen, other = original, trained if is_packed else None
        delta = None if weight.delta is None else functools.partial(held.delta, weight)
        # The update of a convolution's kernel cannot be applied to activations as a product of two matrices.
        low_rank = weight.delta is None or (weight.delta.low_rank and len(weight.shape) == 2)
        self.merges.append(MergeInputs(weight.name, trained, original, delta, low_rank))
        merged = _MergedTensor(chosen, other, delta, weight.name, self)
        self.tensors[weight.name] = PlannedTensor(weight.shape, self.dtype, merged.slices)

    def packing_ahead(self) -> AbstractContextManager[None]:
        """Within the block, packs the weights of a checkpoint on disk before their rows are read."""
        weights = [rows for merge in self.merges for rows in merge.trained if isinstance(rows, RepackedRows)]
        return packing_ahead(weights) if weights else nullcontext()

    def compared(self, written: Mapping[str, LazyTensor]) -> ModelsToCompare:
        """Returns the models to compare with the adapter model. written: the export, read back from its files."""
        rest = {name: tensor.slices for name, tensor in self.tensors.items()}  # integers do not differ
        base = LazyWeights(rest | {merge.name: functools.partial(merge.base, SLICE_BYTES) for merge in self.merges})
        apart = {merge.name: merge.delta for merge in self.merges if merge.delta is not None and merge.low_rank}
        whole = {
            merge.name: functools.partial(merge.merged, False, torch.float32, SLICE_BYTES)
            for merge in self.merges
            if not merge.low_rank
        }
        merged = {self.base: LazyWeights({name: _reader(stored) for name, stored in written.items()})}
        missing: dict[str, str] = {}
        other = ORIGINAL if self.base == DEQUANTIZED else DEQUANTIZED
        without_original = [merge.name for merge in self.merges if merge.original is None]
        if other == ORIGINAL and without_original:
            missing[ORIGINAL] = f"no checkpoint with its {without_original[0]} was found"
        else:
            from_original = other == ORIGINAL
            other_merge = {
                merge.name: functools.partial(merge.merged, from_original, self.dtype, SLICE_BYTES)
                for merge in self.merges
            }
            merged[other] = LazyWeights(rest | other_merge)
        return ModelsToCompare(base, LazyWeights({**base.tensors, **whole}, _LazyDeltas(apart)), merged, missing)

    def report(self) -> MergeReport:
        """Returns the figures of all tensors, in the order of the plan."""
        name = next(name for name, dtype in FLOAT_DTYPES.items() if dtype == self.dtype)
        # Tensors are written in another order, by shards.
        place = {tensor: number for number, tensor in enumerate(self.tensors)}
        return MergeReport(self.base, name, tuple(sorted(self.figures, key=lambda figures: place[figures.name])))


def _reader(stored: LazyTensor) -> Callable[[], Iterator[Tensor]]:
    return lambda: (rows for _, rows in read_slices(stored, SLICE_BYTES))


@dataclass(frozen=True)
class _MergedTensor:
    """W0 + scaling * B A of one tensor, and its figures.

    chosen: W0 that the update is added to. other: the other base, for measuring the error of packing. Both are one
    matrix, or the matrices of a stack. delta: computes or reads the update.
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
            if not isinstance(update, Replacement) and update.additive:
                figures.update = update.squared_norm()
            else:
                figures.update = 0.0  # summed up slice by slice
        versions = zip(self.chosen) if self.other is None else zip(self.chosen, self.other, strict=True)
        for start, (rows, *other), delta in aligned_slices(versions, update, SLICE_BYTES):
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
