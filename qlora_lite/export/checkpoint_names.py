"""Gives the tensors of an export the names and pieces that the checkpoint has, by undoing what loading did.

Loading makes each tensor M of the model from tensors S of the checkpoint, as views (checkpoints/conversion.py). Each
view has an inverse, so the tensors of the checkpoint are views of the model's:

    M = stack(S1, S2)              S1 = M[0], S2 = M[1]
    M = cat(S1, S2) along dim      S1 = the first part of M along dim, S2 = the rest
    M = transpose(S)               S = transpose(M)
    M = interleave(S)              S = interleave(M), the other way round
    M1, M2 = parts of S            S = cat(M1, M2)

The views are those of the checkpoint that the model came from. Without one, they are those by which the tensors that
transformers' `save_pretrained` would write are loaded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from qlora_lite import architecture
from qlora_lite.checkpoints.conversion import Converted, converted_tensors, tensors_as_saved
from qlora_lite.checkpoints.lazy_tensors import (
    Concatenated,
    Interleaved,
    LazyTensor,
    Narrowed,
    ShapeOnlyTensor,
    Stacked,
    Transposed,
)
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.export.merged_tensor import ExportedTensor, TransposedOnce
from qlora_lite.export.plain_weights import PlainWeight, plain_weights
from qlora_lite.surgery import is_below, left_out_towers

# Where the names of an export come from: the checkpoint, or the model.
CHECKPOINT, MODEL = NAMES = ("checkpoint", "model")
SHOWN = 4
# (number of the model's tensor, matrix of it, row of the matrix) where a tensor of the checkpoint begins.
Place = tuple[int, int, int]


def cannot_be_written(model: nn.Module, problems: Iterable[str]) -> CheckpointError:
    """Returns the error for tensors that cannot be given the checkpoint's names."""
    return CheckpointError(
        f"this {type(model).__name__} cannot be written with its checkpoint's names: "
        f"{listing(problems, SHOWN, '; ')}; ask for names='model' (--names model), which gives it transformers' own"
    )


class CheckpointNames:
    """How a checkpoint has the tensors of a model.

    source: the checkpoint that the model came from, by its own names; None if there is none in full precision.
    """

    def __init__(self, model: nn.Module, source: Mapping[str, LazyTensor] | None) -> None:
        self._model, self._source = model, source
        self._shapes = {weight.name: weight.shape for weight in plain_weights(model)}
        self.converted = self._as_saved if source is None else converted_tensors(model, self._shapes, source)

    @property
    def is_of_source(self) -> bool:
        """Whether these are the names of the checkpoint that the model came from."""
        return self._source is not None

    @functools.cached_property
    def _as_saved(self) -> Converted:
        """The tensors that transformers would save, and how they make those of the model."""
        empty = {
            weight.name: torch.empty(weight.shape, dtype=weight.holder.dtype, device="meta")
            for weight in plain_weights(self._model)
        }
        try:
            saved = tensors_as_saved(self._model, empty)
        except CheckpointError as error:
            raise cannot_be_written(self._model, [str(error)]) from error
        return self._loaded({name: tuple(tensor.shape) for name, tensor in saved.items()})

    def _loaded(self, stored: Mapping[str, tuple[int, ...]]) -> Converted:
        """Returns what a checkpoint with tensors of these names and shapes makes of the model's tensors."""
        files = {name: ShapeOnlyTensor(name, torch.float32, shape) for name, shape in stored.items()}
        if not hasattr(self._model, "base_model_prefix"):  # not from transformers, which converts nothing then
            return Converted(dict(files))
        return converted_tensors(self._model, self._shapes, files)

    def views(self, weights: Iterable[PlainWeight]) -> dict[str, LazyTensor]:
        """Returns each of these tensors of the model as a view of the checkpoint's, by the model's names.

        A tensor that the checkpoint lacks, such as a head that was tied to the embedding, gets the name that
        transformers would save it under. Raises CheckpointError, listing tensors that cannot be converted back.
        """
        weights = list(weights)
        written = {weight.name for weight in weights}
        found: dict[str, LazyTensor] = {}
        for weight in weights:
            # A tied weight may be in the checkpoint under its other name alone.
            names = [weight.name, *(name for name in weight.tied_to if name not in written)]
            stored = next((name for name in names if name in self.converted.tensors), None)
            if stored is not None:
                found[weight.name] = self.converted.tensors[stored]
        lacking = [weight.name for weight in weights if weight.name not in found]
        unknown = [name for name in lacking if name not in self._as_saved.tensors]
        problems = [f"{name} has no name in it" for name in unknown] + self.converted.problems
        shapes = {weight.name: weight.shape for weight in weights}
        problems += [
            f"{name} is {shapes[name]} and was made of tensors that give {view.shape}"
            for name, view in found.items()
            if view.shape != shapes[name]
            and isinstance(view, (Stacked, Concatenated, Narrowed, Transposed, Interleaved))
        ]
        if problems:
            raise cannot_be_written(self._model, problems)
        return {name: found[name] if name in found else self._as_saved.tensors[name] for name in shapes}

    def tensors(self, views: Mapping[str, LazyTensor], exported: Mapping[str, ExportedTensor]) -> dict[str, LazyTensor]:
        """Returns the checkpoint's tensors as views of those of the export, in the order in which these are read.

        views: of the checkpoint's tensors, by the model's names (`views`). Raises CheckpointError for a tensor that is
        not covered by the model's, or that two of them make.
        """
        inverse = _Inverse()
        for number, (name, view) in enumerate(views.items()):
            inverse.add(view, exported[name], (number, 0, 0))
        try:
            inverse.join_parts()
        except CheckpointError as error:
            inverse.problems.append(str(error))
        if not inverse.problems and self._source is not None and not inverse.made.keys() <= self._source.keys():
            inverse.problems += self._not_loaded({name: tensor.shape for name, (_, tensor) in inverse.made.items()})
        if inverse.problems:
            raise cannot_be_written(self._model, inverse.problems)
        return {name: tensor for name, (_, tensor) in sorted(inverse.made.items(), key=lambda item: item[1][0])}

    def _not_loaded(self, stored: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Returns a sentence for each tensor of the model that a checkpoint of these tensors would not give it."""
        loaded = self._loaded(stored).tensors
        aliases = architecture.tied_names(self._model)
        return [f"{name} would not be loaded again" for name in self._shapes if name not in {*loaded, *aliases}]

    def rest(self) -> dict[str, LazyTensor]:
        """Returns the tensors of the source that the model has no place for, by their names there.

        transformers passes over them, but another reader may need them: the vision tower of a checkpoint of which the
        language model was loaded, or layers that predict further tokens. So are the tensors of towers that were left
        out of the model (surgery.py).
        """
        if self._source is None:
            return {}
        patterns = [re.compile(pattern) for pattern in architecture.ignorable_keys(self._model)]
        towers = left_out_towers(self._model)
        passed_over = [
            name
            for name, target in self.converted.unexpected.items()
            if is_below(target, towers) or any(pattern.search(name) or pattern.search(target) for pattern in patterns)
        ]
        return {name: self._source[name] for name in passed_over}


def is_read_by_matrix(view: LazyTensor) -> bool:
    """Whether the tensors of the checkpoint are matrices of a stack, or parts of them."""
    return len(view.shape) == 3 and _divides_matrices(view)


def _divides_matrices(view: LazyTensor) -> bool:
    if isinstance(view, Concatenated):
        return view.dim > 0 or any(map(_divides_matrices, view.tensors))
    if isinstance(view, (Narrowed, Interleaved)):
        return view.dim > 0 or _divides_matrices(view.tensor)
    return isinstance(view, (Stacked, Transposed))


@dataclass
class _Inverse:
    """Undoes views. made: (place, view) of each tensor of the checkpoint. parts: of tensors that loading cuts."""

    made: dict[str, tuple[Place, LazyTensor]] = field(default_factory=dict)
    parts: dict[int, list[tuple[Narrowed, Place, LazyTensor]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, view: LazyTensor, value: LazyTensor, place: Place) -> None:
        """Adds the tensors that `view` is made of; value: what the view gives, from `place` on."""
        number, matrix, row = place
        if isinstance(view, Stacked):
            for index, part in enumerate(view.tensors):
                self.add(part, value.select(index), (number, index, row))
        elif isinstance(view, Concatenated):
            for part in view.tensors:
                size = part.shape[view.dim]
                self.add(part, Narrowed(part.name, value, view.dim, row - place[2], size), (number, matrix, row))
                row += size
        elif isinstance(view, Transposed):
            self.add(view.tensor, TransposedOnce(value, view.dim0, view.dim1), place)
        elif isinstance(view, Interleaved):
            self.add(view.tensor, Interleaved(value, view.dim, not view.inverse), place)
        elif isinstance(view, Narrowed):
            self.parts.setdefault(id(view.tensor), []).append((view, place, value))
        elif view.name in self.made:
            self.problems.append(f"{view.name} would be written twice")
        else:
            self.made[view.name] = place, value

    def join_parts(self) -> None:
        """Adds the tensors that loading cuts. Raises CheckpointError if the parts of one have different shapes."""
        while self.parts:
            _, parts = self.parts.popitem()
            parts.sort(key=lambda part: part[0].start)
            source, dim = parts[0][0].tensor, parts[0][0].dim
            ends = [part.start + part.length for part, _, _ in parts]
            whole = all(part.dim == dim for part, _, _ in parts)
            if not whole or [part.start for part, _, _ in parts] + [source.shape[dim]] != [0, *ends]:
                self.problems.append(f"the model has only parts of {source.name}")
                continue
            joined = Concatenated(source.name, tuple(value for _, _, value in parts), dim)
            self.add(source, joined, min(place for _, place, _ in parts))
