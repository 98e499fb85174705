"""Builds a model's tensors from those of its checkpoint: renamed, stacked, joined, cut, transposed or interleaved.

The step of a weight on its way in between lazy_tensors.py and pack_on_load.py. `conversions` asks transformers which
tensors of the checkpoint make which tensor of the model, by which operations; `converted_tensors` applies these to lazy
tensors. `OPERATIONS` has a row for each known operation; an error names any other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from qlora_lite.checkpoints.lazy_tensors import Concatenated, Interleaved, LazyTensor, Narrowed, Stacked, Transposed
from qlora_lite.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
# Lazy tensors by the pattern of transformers' rule that their names match; several if the pattern has a star.
ViewsByPattern = dict[str, list[LazyTensor]]


class Operation(Protocol):
    """The attributes of transformers' operations that are read here; each operation has some of them."""

    dim: int
    dim0: int
    dim1: int
    check_dims: bool
    inverse: bool
    num_shards_attribute: str | None


@dataclass(frozen=True)
class Conversion:
    """How transformers makes one or several tensors of a model from those of a checkpoint.

    target: the model's name of the first one. sources: names in the checkpoint by the pattern that they match.
    operations: transformers' objects, in order; none if only the name differs.
    """

    target: str
    sources: dict[str, list[str]]
    source_patterns: tuple[str, ...] = ()
    target_patterns: tuple[str, ...] = ()
    operations: tuple[Operation, ...] = ()

    @property
    def targets(self) -> set[str]:
        """The names in the model of all tensors that are made."""
        patterns = self.target_patterns or (self.target,)
        return {self.target.replace(patterns[0], pattern) for pattern in patterns}


def conversions(model: Any, wanted: Iterable[str], names: Iterable[str]) -> list[Conversion]:
    """Returns how transformers makes the tensors of a model from those of a checkpoint.

    wanted: names in the model's `state_dict`. names: in the checkpoint. A tensor that the model does not need comes as
    a conversion whose target is not in `wanted`.
    """
    loading = importlib.import_module("transformers.core_model_loading")
    rules = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    model_names = {name: name for name in wanted}
    found: dict[tuple[str, int], Conversion] = {}
    for name in sorted(names, key=loading.dot_natural_key):  # matrices of a stack in the order of their numbers
        target, pattern = loading.rename_source_key(name, renamings, converters, model.base_model_prefix, model_names)
        if target not in model_names and name in model_names:  # already under the model's name
            target, pattern = name, None
        rule = by_pattern.get(pattern)
        made = Conversion(target, {})
        if rule is not None:
            patterns = (tuple(rule.source_patterns), tuple(rule.target_patterns), tuple(rule.operations))
            made = Conversion(target, {}, *patterns)
        found.setdefault((target, id(rule)), made).sources.setdefault(pattern or "", []).append(name)
    return list(found.values())


@dataclass
class Converted:
    """The result of `converted_tensors`.

    tensors: by the model's names. unexpected: tensors of the checkpoint that the model does not need, with the name
    that each would have in it. failed: tensors of the model that cannot be made. problems: why, in sentences.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Rule:
    """One of transformers' rules, applied to make the model's tensor `target`.

    sources, targets: the patterns of the rule. shapes: of the model's tensors, by name.
    """

    target: str
    sources: list[str]
    targets: list[str]
    shapes: Shapes

    def only(self, views: ViewsByPattern, operation: object) -> LazyTensor:
        """Returns the single tensor that the operation takes. Raises CheckpointError if there are several."""
        found = [view for several in views.values() for view in several]
        if len(found) != 1:
            raise CheckpointError(f"{self.target}: {operation!r} of {len(found)} tensors is not supported")
        return found[0]

    def one_target(self, operation: object) -> str:
        """Returns the single target of the rule. Raises CheckpointError if there are several."""
        if len(self.targets) != 1:
            raise CheckpointError(f"{self.target}: {operation!r} into {len(self.targets)} tensors is not supported")
        return self.targets[0]


def _stacked(operation: Operation, views: ViewsByPattern, rule: _Rule) -> ViewsByPattern:
    """MergeModulelist: stacks the tensors of each pattern along a new first dimension."""
    if operation.dim != 0:
        raise CheckpointError(f"{rule.target}: {operation!r} is not supported, only stacks along dimension 0")
    made: ViewsByPattern = {}
    for pattern, several in views.items():
        key = rule.one_target(operation) if len(views) == 1 else pattern
        made[key] = [Stacked(rule.target, tuple(several))]
    return made


def _joined(operation: Operation, views: ViewsByPattern, rule: _Rule) -> ViewsByPattern:
    """Concatenate: joins the tensors of all patterns, in the order of the rule's patterns."""
    parts = tuple(view for pattern in rule.sources for view in views.get(pattern, []))
    return {rule.one_target(operation): [Concatenated(rule.target, parts, operation.dim)]}


def _cut(source: LazyTensor, targets: list[str], sizes: list[int], dim: int) -> ViewsByPattern:
    made: ViewsByPattern = {}
    start = 0
    for target, size in zip(targets, sizes, strict=True):
        made[target] = [Narrowed(source.name, source, dim, start, size)]
        start += size
    return made


def _in_chunks(operation: Operation, views: ViewsByPattern, rule: _Rule) -> ViewsByPattern:
    """Chunk: cuts one tensor into equal parts, one for each target."""
    source, count = rule.only(views, operation), len(rule.targets)
    size, left = divmod(source.shape[operation.dim], count)
    if operation.num_shards_attribute is not None or left:
        raise CheckpointError(
            f"{rule.target}: {operation!r} of {source.name} {source.shape} into {count} is not supported"
        )
    return _cut(source, rule.targets, [size] * count, operation.dim)


def _in_pieces(operation: Operation, views: ViewsByPattern, rule: _Rule) -> ViewsByPattern:
    """Split: cuts one tensor into parts of the sizes of the targets."""
    source = rule.only(views, operation)
    names = [rule.target.replace(rule.targets[0], target) for target in rule.targets]
    sizes = [rule.shapes[name][operation.dim] for name in names if name in rule.shapes]
    if len(sizes) != len(names) or sum(sizes) != source.shape[operation.dim]:
        raise CheckpointError(f"{source.name} {source.shape} cannot be cut into {', '.join(names)}")
    return _cut(source, rule.targets, sizes, operation.dim)


def _transposed(operation: Operation, views: ViewsByPattern, rule: _Rule) -> ViewsByPattern:
    """Transpose: exchanges two dimensions; with check_dims only if the shape differs from the model's."""
    source = rule.only(views, operation)
    key = rule.targets[0] if len(rule.targets) == 1 else rule.sources[0]
    first, second = sorted(dim % len(source.shape) for dim in (operation.dim0, operation.dim1))
    if operation.check_dims and source.shape == rule.shapes.get(rule.target):
        return {key: [source]}
    return {key: [Transposed(source, first, second)]}


def _interleaved(operation: Operation, views: ViewsByPattern, rule: _Rule) -> ViewsByPattern:
    """Interleave: puts the even places of a dimension before the odd ones, or the other way round."""
    source = rule.only(views, operation)
    if source.shape[operation.dim] % 2:
        raise CheckpointError(f"{rule.target}: {operation!r} of {source.name} {source.shape} is not supported")
    return {rule.targets[0]: [Interleaved(source, operation.dim, operation.inverse)]}


OPERATIONS: dict[str, Callable[[Operation, ViewsByPattern, _Rule], ViewsByPattern]] = {
    "MergeModulelist": _stacked,
    "Concatenate": _joined,
    "Chunk": _in_chunks,
    "Split": _in_pieces,
    "Transpose": _transposed,
    "Interleave": _interleaved,
}


def _made(conversion: Conversion, files: Mapping[str, LazyTensor], shapes: Shapes) -> dict[str, LazyTensor]:
    """Returns the model's tensors that one conversion makes. Raises CheckpointError for an unknown operation."""
    views: ViewsByPattern = {pattern: [files[name] for name in names] for pattern, names in conversion.sources.items()}
    rule = _Rule(conversion.target, list(conversion.source_patterns), list(conversion.target_patterns), shapes)
    for operation in conversion.operations:
        apply = OPERATIONS.get(type(operation).__name__)
        if apply is None:
            raise CheckpointError(
                f"{conversion.target}: transformers makes it by {operation!r}, which is not supported "
                f"(supported: {', '.join(OPERATIONS)}); save the model once with transformers' save_pretrained("
                f"save_original_format=False)"
            )
        views = apply(operation, views, rule)
    # As in transformers, all results get the prefix and suffix of the target around the first key that it contains.
    prefix, _, suffix = next(rule.target.partition(key) for key in views if key in rule.target)
    return {f"{prefix}{key}{suffix}": several[0] for key, several in views.items()}


def converted_tensors(model: nn.Module, shapes: Shapes, files: Mapping[str, LazyTensor]) -> Converted:
    """Returns what transformers would load into the model's tensors from a checkpoint's, as lazy tensors.

    shapes: of the model's tensors, by name. files: the checkpoint's tensors, by name. Nothing is read. Problems are
    listed in the result and not raised, because the caller knows which tensors it needs.
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
            found.problems.append(f"{conversion.target} is in the checkpoint more than once: {', '.join(twice)}")
        found.tensors |= made
    return found


def tensors_as_saved(model: Any, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns tensors on meta as the checkpoint of a model has them, converted back by transformers.

    tensors: by the model's names; None for those of the model, which is on meta. A model that is not from transformers
    has no conversion. Raises CheckpointError for a conversion that transformers cannot undo.
    """
    given = dict(model.state_dict() if tensors is None else tensors)
    if not hasattr(model, "base_model_prefix"):
        return given
    loading = importlib.import_module("transformers.core_model_loading")
    try:
        return loading.revert_weight_conversion(model, given)  # type: ignore[no-any-return]
    except MemoryError:
        raise
    except Exception as error:  # its operations raise whatever torch raises
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"transformers cannot undo the conversion of a {type(model).__name__}'s checkpoint: {reason}"
        ) from error
