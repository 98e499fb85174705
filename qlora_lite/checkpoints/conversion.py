"""The tensors that a model wants, as views on those that its checkpoint has: other names, stacks, joints, cuts.

Which names and operations those are, transformers says (hub.py asks it). Each operation has a row in `OPERATIONS`,
which does to views what transformers' own does to tensors that were read whole; a checkpoint that needs another one
is refused by the operation's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qlora_lite.checkpoints.lazy_tensors import Concatenated, LazyTensor, Narrowed, Stacked, Transposed
from qlora_lite.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
# Views by the pattern of transformers' rule that their names match; several of a pattern with a star in it.
ViewsByPattern = dict[str, list[LazyTensor]]


@dataclass
class Converted:
    """Views by the model's names, and what is wrong.

    unexpected: tensors that nothing of the model is made of, and the name that each would have in it.
    problems: sentences about `failed`, tensors of the model that cannot be made of what is there.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Rule:
    """One of transformers' rules, at work on the model's tensor `target`."""

    target: str
    sources: list[str]
    targets: list[str]
    shapes: Shapes

    def only(self, views: ViewsByPattern, operation: Any) -> LazyTensor:
        """The one view there is, for operations on one."""
        found = [view for several in views.values() for view in several]
        if len(found) != 1:
            raise CheckpointError(f"{self.target}: {operation!r} of {len(found)} tensors is not known here")
        return found[0]

    def one_target(self, operation: Any) -> str:
        if len(self.targets) != 1:
            raise CheckpointError(f"{self.target}: {operation!r} into {len(self.targets)} tensors is not known here")
        return self.targets[0]


def _stacked(operation: Any, views: ViewsByPattern, rule: _Rule) -> ViewsByPattern:
    """MergeModulelist: the tensors of each pattern along a new first dimension."""
    if operation.dim != 0:
        raise CheckpointError(f"{rule.target}: {operation!r} is not known here, only stacks along dimension 0")
    made: ViewsByPattern = {}
    for pattern, several in views.items():
        key = rule.one_target(operation) if len(views) == 1 else pattern
        made[key] = [Stacked(rule.target, tuple(several))]
    return made


def _joined(operation: Any, views: ViewsByPattern, rule: _Rule) -> ViewsByPattern:
    """Concatenate: the tensors of all patterns, in the rule's order of patterns, one after the other."""
    parts = tuple(view for pattern in rule.sources for view in views.get(pattern, []))
    return {rule.one_target(operation): [Concatenated(rule.target, parts, operation.dim)]}


def _cut(source: LazyTensor, targets: list[str], sizes: list[int], dim: int) -> ViewsByPattern:
    made: ViewsByPattern = {}
    start = 0
    for target, size in zip(targets, sizes, strict=True):
        made[target] = [Narrowed(source.name, source, dim, start, size)]
        start += size
    return made


def _in_chunks(operation: Any, views: ViewsByPattern, rule: _Rule) -> ViewsByPattern:
    """Chunk: one tensor cut into equal parts, one for each target."""
    source, count = rule.only(views, operation), len(rule.targets)
    size, left = divmod(source.shape[operation.dim], count)
    if operation.num_shards_attribute is not None or left:
        raise CheckpointError(f"{rule.target}: {operation!r} of {source.name} {source.shape} into {count} is not known")
    return _cut(source, rule.targets, [size] * count, operation.dim)


def _in_pieces(operation: Any, views: ViewsByPattern, rule: _Rule) -> ViewsByPattern:
    """Split: one tensor cut into parts of the targets' sizes."""
    source = rule.only(views, operation)
    names = [rule.target.replace(rule.targets[0], target) for target in rule.targets]
    sizes = [rule.shapes[name][operation.dim] for name in names if name in rule.shapes]
    if len(sizes) != len(names) or sum(sizes) != source.shape[operation.dim]:
        raise CheckpointError(f"{source.name} {source.shape} cannot be cut into {', '.join(names)}")
    return _cut(source, rule.targets, sizes, operation.dim)


def _transposed(operation: Any, views: ViewsByPattern, rule: _Rule) -> ViewsByPattern:
    """Transpose: two dimensions exchanged; with check_dims only where the model has them so."""
    source = rule.only(views, operation)
    key = rule.targets[0] if len(rule.targets) == 1 else rule.sources[0]
    first, second = sorted(dim % len(source.shape) for dim in (operation.dim0, operation.dim1))
    if operation.check_dims and source.shape == rule.shapes.get(rule.target):
        return {key: [source]}
    return {key: [Transposed(source, first, second)]}


OPERATIONS: dict[str, Callable[[Any, ViewsByPattern, _Rule], ViewsByPattern]] = {
    "MergeModulelist": _stacked,
    "Concatenate": _joined,
    "Chunk": _in_chunks,
    "Split": _in_pieces,
    "Transpose": _transposed,
}


def _made(conversion: Conversion, files: Mapping[str, LazyTensor], shapes: Shapes) -> dict[str, LazyTensor]:
    """The model's tensors that one rule makes. CheckpointError for an operation that is not known."""
    views: ViewsByPattern = {pattern: [files[name] for name in names] for pattern, names in conversion.sources.items()}
    rule = _Rule(conversion.target, list(conversion.source_patterns), list(conversion.target_patterns), shapes)
    for operation in conversion.operations:
        act = OPERATIONS.get(type(operation).__name__)
        if act is None:
            raise CheckpointError(
                f"{conversion.target}: transformers makes it by {operation!r}, which is not known here "
                f"(known are {', '.join(OPERATIONS)}); save the model once with transformers' save_pretrained("
                f"save_original_format=False)"
            )
        views = act(operation, views, rule)
    # As in transformers, the first key that is part of the name says what stands before and behind each of them.
    before, _, behind = next(rule.target.partition(key) for key in views if key in rule.target)
    return {f"{before}{key}{behind}": several[0] for key, several in views.items()}


def converted_tensors(model: nn.Module, shapes: Shapes, files: Mapping[str, LazyTensor]) -> Converted:
    """What transformers would load into the model's tensors (`shapes`: by name) from a checkpoint's, as views.

    Nothing is read. What cannot be made is no error yet, but listed: the caller knows what it needs.
    """
    found = Converted()
    for conversion in conversions(model, shapes, files):
        names = [name for several in conversion.sources.values() for name in several]
        if conversion.target not in shapes:
            found.unexpected |= dict.fromkeys(names, conversion.target)
            continue
        try:
            made = _made(conversion, files, shapes) if conversion.operations else {conversion.target: files[names[0]]}
        except CheckpointError as error:
            found.problems.append(str(error))
            found.failed |= conversion.targets
            continue
        twice = [*names[:4]] if not conversion.operations and len(names) > 1 else []
        twice += sorted(made.keys() & found.tensors.keys())
        if twice:
            found.problems.append(f"{conversion.target} is there more than once: {', '.join(twice)}")
        found.tensors |= made
    return found


@dataclass(frozen=True)
class Conversion:
    """How transformers makes one or more tensors of a model from those of a checkpoint.

    target: the model's name of the first; sources: the checkpoint's names by the pattern that they match;
    operations: transformers' own, in order, none where only the name differs.
    """

    target: str
    sources: dict[str, list[str]]
    source_patterns: tuple[str, ...] = ()
    target_patterns: tuple[str, ...] = ()
    operations: tuple[Any, ...] = ()

    @property
    def targets(self) -> set[str]:
        """The model's names of all that is made."""
        patterns = self.target_patterns or (self.target,)
        return {self.target.replace(patterns[0], pattern) for pattern in patterns}


def tensors_as_saved(model: Any) -> dict[str, Tensor]:
    """The tensors of a model on meta as a checkpoint has them: other names, and pieces, where transformers converts."""
    loading = importlib.import_module("transformers.core_model_loading")
    return loading.revert_weight_conversion(model, dict(model.state_dict()))  # type: ignore[no-any-return]


def conversions(model: Any, wanted: Iterable[str], names: Iterable[str]) -> list[Conversion]:
    """What transformers makes of a checkpoint's tensors, by name, for a model that wants these (its `state_dict`).

    A tensor that the model has no place for comes as a conversion to a target that is not wanted.
    """
    loading = importlib.import_module("transformers.core_model_loading")
    rules = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    places = {name: name for name in wanted}
    found: dict[tuple[str, int], Conversion] = {}
    for name in sorted(names, key=loading.dot_natural_key):  # a stack's matrices come in the order of their numbers
        target, pattern = loading.rename_source_key(name, renamings, converters, model.base_model_prefix, places)
        if target not in places and name in places:  # it lies under the model's own name already
            target, pattern = name, None
        rule = by_pattern.get(pattern)
        made = Conversion(target, {})
        if rule is not None:
            patterns = (tuple(rule.source_patterns), tuple(rule.target_patterns), tuple(rule.operations))
            made = Conversion(target, {}, *patterns)
        found.setdefault((target, id(rule)), made).sources.setdefault(pattern or "", []).append(name)
    return list(found.values())
