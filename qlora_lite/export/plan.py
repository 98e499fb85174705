"""Plans an export: every tensor of the plain checkpoint, how its rows are computed, and the figures of the report.

The step of a weight on its way out between merged_tensor.py, which computes a tensor of the model, checkpoint_names.py,
which makes those of the checkpoint from it, and merged.py, which writes the plan. Nothing is read or computed before a
tensor is written, and then some rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints.lazy_tensors import LazyTensor, read_slices
from qlora_lite.checkpoints.safetensors_write import PlannedTensor
from qlora_lite.checks import FLOAT_DTYPES
from qlora_lite.compute.host_memory import HeapTrimmer
from qlora_lite.compute.weight_update import Delta, Replacement, Update
from qlora_lite.errors import CheckpointError
from qlora_lite.export.checkpoint_names import CheckpointNames, is_read_by_matrix
from qlora_lite.export.lazy_model import LazyWeights
from qlora_lite.export.merged_tensor import SLICE_BYTES, ExportedTensor, IntegerTensor, MergedTensor, view_slices
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
    packing_ahead,
)


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


def _written_dtype(model: Any, weight: PlainWeight, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which a float is written: float32 for what the model keeps in it beside 16-bit weights."""
    held = weight.holder
    is_kept = isinstance(held, Tensor) and held.dtype == torch.float32 and getattr(model, "dtype", None) != held.dtype
    return (
        torch.float32 if is_kept and weight.delta is None else architecture.dtype_as_loaded(model, weight.name, dtype)
    )


@dataclass
class ExportPlan:
    """The tensors to write, and the figures that are measured while they are written.

    untied: whether tied weights are written apart, because an adapter is on one of them. tensors: by the names in the
    files. is_whole: whether these include all of the checkpoint that the model came from. exported: by the model's
    names. merges: the inputs of every floating tensor. holes: checked after each
    tensor, so that freed pages do not accumulate.
    """

    base: str
    dtype: torch.dtype
    untied: bool
    is_whole: bool = False
    tensors: dict[str, PlannedTensor] = field(default_factory=dict)
    exported: dict[str, ExportedTensor] = field(default_factory=dict)
    figures: list[TensorFigures] = field(default_factory=list)
    merges: list[MergeInputs] = field(default_factory=list)
    holes: HeapTrimmer = field(default_factory=HeapTrimmer)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        base: str,
        dtype: torch.dtype,
        held: ModelWeights,
        originals: Mapping[str, LazyTensor],
        names: CheckpointNames | None = None,
        in_fp32: Callable[[PlainWeight], bool] = lambda weight: False,
    ) -> ExportPlan:
        """Plans all tensors of a model.

        held: the model's weights as they were in training. originals: the checkpoint's tensors in full precision.
        names: how the checkpoint has the model's tensors; None to give these the model's own names. in_fp32: whether a
        weight is written in fp32 whatever the dtype.
        Raises CheckpointError if the base is `original` and one of these is missing, and for tensors that cannot be
        given the checkpoint's names.
        """
        weights, untied = weights_to_write(model)
        plan = cls(base, dtype, untied, names is not None and names.is_of_source)
        views = {} if names is None else names.views(weights)
        for weight in weights:
            view = views.get(weight.name)
            by_matrix = view is not None and is_read_by_matrix(view)
            written = torch.float32 if in_fp32(weight) else _written_dtype(model, weight, dtype)
            plan._add(weight, held, originals, by_matrix, written)
        if names is None:
            plan.tensors = {name: _planned(tensor) for name, tensor in plan.exported.items()}
        else:
            plan.tensors = {name: _planned(view) for name, view in names.tensors(views, plan.exported).items()}
            plan.tensors |= {name: _as_it_is(stored) for name, stored in names.rest().items()}
        return plan

    def _add(
        self,
        weight: PlainWeight,
        held: ModelWeights,
        originals: Mapping[str, LazyTensor],
        by_matrix: bool,
        dtype: torch.dtype,
    ) -> None:
        """Adds a tensor of the model. by_matrix: whether the files have matrices of this stack, or parts of them."""
        if isinstance(weight.holder, Tensor) and not weight.holder.is_floating_point():
            whole = functools.partial(held.integers, weight)
            self.exported[weight.name] = IntegerTensor(weight.name, weight.shape, weight.holder.dtype, whole)
            return
        trained = held.trained(weight, by_matrix)
        stored = originals.get(weight.name_in(originals) or weight.name)
        original = as_stored(stored, trained) if stored is not None and stored.shape == weight.shape else None
        if self.base == ORIGINAL and original is None:
            raise CheckpointError(f"base='original' needs {weight.name} in full precision, which the checkpoint lacks")
        is_packed = isinstance(trained[0], (PackedRows, TransposedRows, RepackedRows))
        chosen, other = trained, original if is_packed else None
        if self.base == ORIGINAL and original is not None:
            chosen, other = original, trained if is_packed else None
        is_stack = len(trained[0].shape) < len(weight.shape)
        delta = None if weight.delta is None else functools.partial(_update, held, weight, is_stack)
        # The update of a convolution's kernel cannot be applied to activations as a product of two matrices.
        low_rank = weight.delta is None or (weight.delta.low_rank and len(weight.shape) == 2)
        self.merges.append(MergeInputs(weight.name, trained, original, delta, low_rank))
        versions: list[tuple[WeightRows, ...]] = (
            [(rows,) for rows in chosen] if other is None else list(zip(chosen, other, strict=True))
        )
        self.exported[weight.name] = MergedTensor(weight.name, weight.shape, dtype, versions, delta, self._measured)

    def _measured(self, figures: TensorFigures) -> None:
        self.figures.append(figures)
        self.holes.check()

    def packing_ahead(self) -> AbstractContextManager[None]:
        """Within the block, packs the weights of a checkpoint on disk before their rows are read."""
        weights = [rows for merge in self.merges for rows in merge.trained if isinstance(rows, RepackedRows)]
        return packing_ahead(weights) if weights else nullcontext()

    def compared(self, written: Mapping[str, LazyTensor]) -> ModelsToCompare:
        """Returns the models to compare with the adapter model. written: the export, read back from its files."""
        # Integers do not differ; the others are replaced below.
        rest: dict[str, Callable[[], Iterable[Tensor]]] = {n: tensor.slices for n, tensor in self.exported.items()}
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
                merge.name: functools.partial(merge.merged, from_original, self.exported[merge.name].dtype, SLICE_BYTES)
                for merge in self.merges
            }
            merged[other] = LazyWeights(rest | other_merge)
        return ModelsToCompare(base, LazyWeights({**base.tensors, **whole}, _LazyDeltas(apart)), merged, missing)

    def report(self) -> MergeReport:
        """Returns the figures of all tensors, in the order of the plan."""
        name = next(name for name, dtype in FLOAT_DTYPES.items() if dtype == self.dtype)
        # Tensors are written in another order, by shards.
        place = {tensor: number for number, tensor in enumerate(self.exported)}
        return MergeReport(self.base, name, tuple(sorted(self.figures, key=lambda figures: place[figures.name])))


def _reader(stored: LazyTensor) -> Callable[[], Iterator[Tensor]]:
    return lambda: (rows for _, rows in read_slices(stored, SLICE_BYTES))


def _update(held: ModelWeights, weight: PlainWeight, is_stack: bool) -> Update:
    """Returns the update of a weight. is_stack: whether the weight is a stack that is read matrix by matrix."""
    update = held.delta(weight)
    return replace(update, stack=weight.shape[0]) if is_stack and isinstance(update, Replacement) else update


def _planned(tensor: LazyTensor) -> PlannedTensor:
    return PlannedTensor(tensor.shape, tensor.dtype, functools.partial(view_slices, tensor))


def _as_it_is(stored: LazyTensor) -> PlannedTensor:
    """Plans a tensor of the checkpoint that the model does not have; it is written with its bytes."""
    return PlannedTensor(stored.shape, stored.dtype, _reader(stored))
