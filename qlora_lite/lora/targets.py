"""Selects the layers that get an adapter, and resolves each layer's kind, rank and alpha.

`select_targets` reads `target_modules`, `exclude_modules`, `layers_to_transform`, `rank_pattern` and `alpha_pattern` of
a LoraConfig and returns one `TargetedLayer` for each layer. The functions that add, initialize, save and load adapters
take TargetedLayers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from qlora_lite import architecture
from qlora_lite.errors import ConfigError, TargetError, listing
from qlora_lite.lora.auxiliary import find_modules_to_save
from qlora_lite.lora.config import ALL_LINEAR, ALL_LINEAR_WITH_TOWERS, LoraConfig, Targets
from qlora_lite.lora.convolution import refusal_reason
from qlora_lite.lora.experts import adaptable_stacks, unpacked_stacks
from qlora_lite.lora.kinds import Kind, LinearKind, RouterKind, StackKind, kind_of
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.lora.variants import ordinary_alpha, ordinary_rank
from qlora_lite.quantization.experts import stacks
from qlora_lite.surgery import (
    NOT_LANGUAGE_MODEL,
    check_all_matched,
    has_own_forward,
    is_below,
    is_part_of_path,
    name_matches,
    tower_names,
)
from qlora_lite.weight_readers import described_reads, weights_read

BLOCK = re.compile(r"(?:^|.*?\.)[^.]+\.(?P<number>\d+)\.")
# Five digits: no model has more blocks, and a range is expanded to a list.
LAYER_RANGE = re.compile(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?")


@dataclass(frozen=True)
class TargetedLayer:
    """A layer that has or gets an adapter, with the numbers of that adapter.

    name: the layer's first name in the model. module: the layer without an adapter. kind: how it applies A and B.
    rank, alpha: those of this layer's adapter, with rank_pattern and alpha_pattern applied.
    """

    name: str
    module: nn.Module
    kind: Kind
    rank: int
    alpha: float

    @classmethod
    def of(cls, name: str, module: nn.Module, config: LoraConfig) -> TargetedLayer | None:
        """Returns the layer with the rank and alpha that `config` gives it, or None if it cannot be adapted."""
        kind = kind_of(module)
        return None if kind is None else cls(name, module, kind, config.rank_of(name), config.alpha_of(name))

    @classmethod
    def of_adapter(cls, name: str, layer: LoraLayer) -> TargetedLayer:
        """Returns the base layer of a LoraLayer, with the rank and alpha of its `factors`."""
        return cls(name, layer.base_layer, layer.kind, ordinary_rank(layer), ordinary_alpha(layer))

    @property
    def is_stack(self) -> bool:
        """Whether the layer is a stack of experts' matrices."""
        return isinstance(self.kind, StackKind)

    @property
    def is_router(self) -> bool:
        """Whether the layer is a router of experts."""
        return isinstance(self.kind, RouterKind)

    @property
    def peft_name(self) -> str:
        """The layer's name in peft's rank_pattern, alpha_pattern and target_parameters: of a router, its weight's."""
        return f"{self.name}.weight" if self.is_router else self.name


def block_number(name: str) -> int | None:
    """Returns the number of the repeated block that a layer is in, or None for a layer outside of the blocks.

    The first number in the name that follows another part counts, as in peft's `layers_to_transform`:
    `model.layers.7.mlp.experts.0.up_proj` and `layers.7.mlp.up_proj` are in block 7.
    """
    found = BLOCK.match(name)
    return None if found is None else int(found["number"])


def layer_numbers(text: str) -> list[int]:
    """Parses numbers and ranges: `"0-3,12"` -> [0, 1, 2, 3, 12]. Raises ConfigError for any other text."""
    numbers: list[int] = []
    for part in text.split(","):
        match = LAYER_RANGE.fullmatch(part)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span:
            raise ConfigError(f"layers_to_transform must be numbers and ranges such as 0-7,12; got {text!r}")
        numbers += span
    return numbers


def _path_parts(name: str) -> Iterator[tuple[str, ...]]:
    """Yields every part of a dotted name, one name or more, from its left to its right."""
    steps = name.split(".")
    yield from (tuple(steps[first:end]) for first in range(len(steps)) for end in range(first + 1, len(steps) + 1))


def _named_share(part: tuple[str, ...]) -> int:
    """Returns 2 for a part of a path without numbers, 1 for one with numbers and names, 0 for a number."""
    numbers = sum(map(str.isdigit, part))
    return 2 if numbers == 0 else int(numbers < len(part))


def exclusions_for(names: Collection[str], kept: Iterable[str]) -> dict[str, list[str]]:
    """Returns entries of exclude_modules that match all of these layers and none of `kept`, with the layers of each.

    The entries are parts of paths: few, short, and without numbers where that is possible.
    """
    forbidden = {part for name in kept for part in _path_parts(name)}
    matched: dict[tuple[str, ...], set[str]] = {}
    for name in names:
        for part in _path_parts(name):
            if part not in forbidden:
                matched.setdefault(part, set()).add(name)
    left, found = set(names), dict[str, list[str]]()
    while left:
        counts = {part: count for part, matching in matched.items() if (count := len(matching & left))}
        best = max(counts, key=lambda part: (_named_share(part), counts[part], -len(part)))
        found[".".join(best)] = sorted(matched[best] & left)
        left -= matched[best]
    return found


def adaptable_names(model: nn.Module) -> set[str]:
    """Returns the names of the layers that have an adapter or could get one."""
    return {
        name
        for name, module in model.named_modules()
        if (isinstance(module, LoraLayer) or kind_of(module) is not None) and not name.endswith(".base_layer")
    } | adaptable_stacks(model)


def _adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers of a model without adapters that could get one, each under its first name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if kind_of(module) is not None} | unpacked_stacks(model)


def _further_names(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Returns the names of these layers that are not keys of `layers`, each with the key of its layer."""
    first = {module: name for name, module in layers.items()}
    modules = model.named_modules(remove_duplicate=False)
    return {name: first[module] for name, module in modules if module in first and name not in layers}


def _check_first_names(model: nn.Module, targets: Iterable[str], layers: Mapping[str, nn.Module]) -> None:
    """Raises TargetError for targets that match layers by another name than their first only, as peft refuses them."""
    further, wrong, right = _further_names(model, layers), list[str](), list[str]()
    for target in targets:
        matched = [first for name, first in further.items() if name_matches(name, target)]
        if matched and not any(name_matches(name, target) for name in layers):
            wrong.append(target)
            right += matched
    if wrong:
        raise TargetError(
            f"target_modules {wrong} match layers that have several names, by a name that is not their first; "
            f"use the first: {listing(dict.fromkeys(right), 4)}"
        )


def _check_no_unknown_stack(model: nn.Module, targets: Targets, layers: Collection[str]) -> None:
    listed = [] if isinstance(targets, str) or callable(targets) else list(targets)
    unknown = [
        name for name in stacks(model) if name not in layers and any(name_matches(name, target) for target in listed)
    ]
    if unknown:
        raise TargetError(
            f"target_modules names stacks of matrices in modules of an unknown type, which cannot be adapted: "
            f"{listing(unknown, 4)}; leave them out"
        )


def _check_convolutions(model: nn.Module, targets: Targets) -> None:
    """Raises TargetError for targeted convolutions that cannot be adapted; they would be skipped silently otherwise."""
    if callable(targets):
        return
    reasons = {name: reason for name, module in model.named_modules() if (reason := refusal_reason(module)) is not None}
    targeted = _matching("target_modules", targets, {name: model.get_submodule(name) for name in reasons})
    if targeted:
        problems = listing((f"{name}: {reasons[name]}" for name in targeted), 4, "; ")
        raise TargetError(f"{problems}; leave them out of target_modules")


def _check_called(model: nn.Module, names: list[str]) -> None:
    """Raises TargetError for layers whose parent reads their weight instead of calling them: it would skip A and B."""
    if unseen := described_reads(model, names):
        raise TargetError(f"{listing(unseen, 4, '; ')}; leave them out of target_modules")
    fast = [n for n in names if isinstance(model.get_submodule(n.rpartition(".")[0]), nn.TransformerEncoderLayer)]
    if fast:
        raise TargetError(
            f"{listing(fast, 4)}: in eval, nn.TransformerEncoderLayer reads the weights of its layers instead of "
            f"calling them, which would skip an adapter; leave them out of target_modules"
        )


def _matching(
    setting: str,
    targets: Targets,
    layers: Mapping[str, nn.Module],
    matches: Callable[[str, str], bool] = name_matches,
) -> list[str]:
    """Returns the names of the layers that a regular expression, a function or a list of names selects.

    matches: whether a layer's name matches a name in a list.
    """
    if callable(targets):
        return [name for name, layer in layers.items() if targets(name, layer)]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(f"{setting} {targets!r} is not a regular expression: {error}") from error
        return [name for name in layers if pattern.fullmatch(name)]
    return [name for name in layers if any(matches(name, target) for target in targets)]


def left_out_of_all_linear(model: nn.Module, targets: Targets = ALL_LINEAR) -> dict[str, str]:
    """Returns the linear layers that `all-linear`, or `all-linear-with-towers`, leaves out, with the reasons.

    An adapter cannot act on them, or, with `all-linear`, they are not part of the language model. There are none for
    other targets.
    """
    if targets not in (ALL_LINEAR, ALL_LINEAR_WITH_TOWERS):
        return {}
    towers = tower_names(model) if targets == ALL_LINEAR else []
    in_towers = [(name, module) for name, module in model.named_modules() if is_below(name, towers)]
    beside = {name: NOT_LANGUAGE_MODEL for name, module in in_towers if isinstance(kind_of(module), LinearKind)}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    read = weights_read(model)
    own = {n: f"a {type(m).__name__} has a forward of its own" for n, m in linears.items() if has_own_forward(m)}
    return own | {name: f"{read[name]} reads its weight" for name in linears if name in read} | beside


def _all_linear(model: nn.Module, targets: Targets, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns every linear layer but the output head and those that `left_out_of_all_linear` lists."""
    head, left = architecture.output_head(model), left_out_of_all_linear(model, targets)
    linear = {name: layer for name, layer in layers.items() if isinstance(kind_of(layer), LinearKind)}
    return {name: layer for name, layer in linear.items() if layer is not head and name not in left}


def _targeted(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """Returns the layers that target_modules selects, before any exclusion."""
    layers = _adaptable_layers(model)
    _check_no_unknown_stack(model, targets, layers)
    if targets in (ALL_LINEAR, ALL_LINEAR_WITH_TOWERS):
        if targets == ALL_LINEAR_WITH_TOWERS and not tower_names(model):
            raise TargetError(f"a {type(model).__name__} has no tower beside its language model; use {ALL_LINEAR!r}")
        targeted = _all_linear(model, targets, layers)
    else:
        _check_convolutions(model, targets)
        if not isinstance(targets, str) and not callable(targets):
            _check_first_names(model, targets, layers)
            check_all_matched("target_modules", targets, layers)
        targeted = {name: layers[name] for name in _matching("target_modules", targets, layers)}
    if not targeted:
        check_all_matched("target_modules", [str(targets)], layers)
        raise TargetError(f"target_modules {targets!r} matched no layer")
    return targeted


def _unused_settings(
    config: LoraConfig, targeted: Mapping[str, nn.Module], excluded: set[str], left: Collection[str]
) -> list[str]:
    """Returns a sentence for each of layers_to_transform and exclude_modules with an entry that has no effect."""
    sentences = []
    within = [*targeted, *left]
    if config.layers_to_transform is not None:
        has = {number for name in targeted if name not in excluded and (number := block_number(name)) is not None}
        if unused := sorted(set(config.layers_to_transform) - has):
            blocks = f"in blocks {min(has)} to {max(has)}" if has else "in no numbered block"
            sentences.append(
                f"layers_to_transform {unused} contain no targeted layer; the targeted layers are {blocks}"
            )
        within = [name for name in within if block_number(name) in config.layers_to_transform]
    exclude = config.exclude_modules
    if exclude is not None:
        if isinstance(exclude, str) or callable(exclude):
            without_effect = [] if excluded.intersection(within) else [str(exclude)]
        else:
            without_effect = [entry for entry in exclude if not any(is_part_of_path(name, entry) for name in within)]
        if without_effect:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in within})) or "none"
            sentences.append(f"exclude_modules {without_effect} excludes no targeted layer; targeted are: {ends}")
    return sentences


def _without_modules_to_save(chosen: Collection[str], model: nn.Module, config: LoraConfig) -> set[str]:
    """Returns the chosen names; `all-linear` leaves out the modules that modules_to_save names."""
    if config.target_modules not in (ALL_LINEAR, ALL_LINEAR_WITH_TOWERS) or not config.modules_to_save:
        return set(chosen)
    return set(chosen) - find_modules_to_save(model, config.modules_to_save).keys()


def select_targets(model: nn.Module, config: LoraConfig) -> list[TargetedLayer]:
    """Returns the layers that get an adapter: target_modules without exclude_modules, in the blocks of
    layers_to_transform (see LoraConfig).

    A layer with several names is returned once, under its first. The model must not have adapters yet. Raises
    TargetError that lists every entry of target_modules, exclude_modules, layers_to_transform, rank_pattern and
    alpha_pattern that has no effect, and for targeted layers that cannot be adapted.
    """
    targeted = _targeted(model, config.target_modules)
    excluded: set[str] = set()
    # What all-linear leaves out may be excluded by name too.
    left = left_out_of_all_linear(model, config.target_modules)
    if config.exclude_modules is not None:
        excludable = {**targeted, **{name: model.get_submodule(name) for name in left}}
        excluded.update(_matching("exclude_modules", config.exclude_modules, excludable, is_part_of_path))
    if sentences := _unused_settings(config, targeted, excluded, left):
        raise TargetError("; ".join(sentences))
    chosen = {
        name: layer
        for name, layer in targeted.items()
        if name not in excluded
        and (config.layers_to_transform is None or block_number(name) in config.layers_to_transform)
    }
    if not chosen:
        raise TargetError(f"exclude_modules leaves none of the {len(targeted)} targeted layers")
    _check_called(model, [*chosen, *_further_names(model, chosen)])
    names = _without_modules_to_save(chosen, model, config)
    modules = dict(model.named_modules()) | unpacked_stacks(model)
    found = [TargetedLayer.of(name, module, config) for name, module in modules.items() if name in names]
    layers = [layer for layer in found if layer is not None]
    if unused := config.unused_patterns([layer.name for layer in layers]):
        raise TargetError("; ".join(unused))
    return layers
