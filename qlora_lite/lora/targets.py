"""Which layers of a model get an adapter, by `target_modules`, `exclude_modules` and `layers_to_transform`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import nn

from qlora_lite.architecture import output_head
from qlora_lite.errors import ConfigError, TargetError, listing
from qlora_lite.lora.config import ALL_LINEAR, LoraConfig, Targets
from qlora_lite.lora.convolution import read_kernels, why_not
from qlora_lite.lora.experts import open_stacks
from qlora_lite.lora.kinds import LinearKind, kind_of
from qlora_lite.quantization.experts import stacks
from qlora_lite.surgery import answers_to, check_all_matched, has_own_forward

BLOCK = re.compile(r"(?:^|.*?\.)[^.]+\.(?P<number>\d+)\.")
# Five digits: no model has more blocks, and a range is written out.
LAYER_RANGE = re.compile(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?")


def block_number(name: str) -> int | None:
    """The number of the repeated block that a layer is in: the first one in its name that follows a name.

    `model.layers.7.mlp.experts.0.up_proj` -> 7; None for a layer outside of the blocks. Numbers as peft's
    `layers_to_transform` has them, which also counts the blocks of a model that holds them itself (`layers.7.mlp…`).
    """
    found = BLOCK.match(name)
    return None if found is None else int(found["number"])


def layer_numbers(text: str) -> list[int]:
    """`"0-3,12"` -> [0, 1, 2, 3, 12]. ConfigError for anything that is no list of numbers and rising ranges."""
    numbers: list[int] = []
    for part in text.split(","):
        match = LAYER_RANGE.fullmatch(part)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span:
            raise ConfigError(f"layers_to_transform must be numbers and ranges such as 0-7,12; got {text!r}")
        numbers += span
    return numbers


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that could get an adapter, by every name they have."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if kind_of(module) is not None} | open_stacks(model)


def _check_no_linear_is_left_out(chosen: Mapping[str, nn.Module]) -> None:
    own = {name: layer for name, layer in chosen.items() if has_own_forward(layer) and kind_of(layer) is None}
    if own:
        shown = listing((f"{name} ({type(layer).__name__})" for name, layer in own.items()), 4)
        raise TargetError(
            f"all-linear meets {len(own)} layers with a forward of their own, {shown}; leave them out with "
            f"exclude_modules, or name the others"
        )


def _check_no_strange_stack_is_meant(model: nn.Module, targets: Targets, layers: Collection[str]) -> None:
    names = [] if isinstance(targets, str) or callable(targets) else list(targets)
    meant = [name for name in stacks(model) if name not in layers and any(answers_to(name, target) for target in names)]
    if meant:
        raise TargetError(
            f"{listing(meant, 4)}: stacks of matrices in modules that are not known here cannot be adapted; "
            f"leave them out"
        )


def _check_convolutions_meant(model: nn.Module, targets: Targets) -> None:
    """Convolutions that are named and cannot be adapted would else be passed over."""
    if callable(targets):
        return
    reasons = {name: reason for name, module in model.named_modules() if (reason := why_not(module)) is not None}
    meant = _meant("target_modules", targets, {name: model.get_submodule(name) for name in reasons})
    if meant:
        problems = listing((f"{name}: {reasons[name]}" for name in meant), 4, "; ")
        raise TargetError(f"{problems}; leave them out of target_modules")


def _check_called(model: nn.Module, names: list[str]) -> None:
    """An adapter in a layer that its parent does not call would be ignored."""
    if unseen := read_kernels(model, names):
        raise TargetError(f"{listing(unseen, 4, '; ')}; leave them out of target_modules")
    fast = [n for n in names if isinstance(model.get_submodule(n.rpartition(".")[0]), nn.TransformerEncoderLayer)]
    if fast:
        raise TargetError(
            f"{listing(fast, 4)}: in eval, nn.TransformerEncoderLayer reads its layers' weights instead of calling "
            f"them, which would leave an adapter out; leave them out of target_modules"
        )


def _meant(setting: str, targets: Targets, layers: Mapping[str, nn.Module]) -> list[str]:
    """Names of these layers that a regular expression, a function or a list of names means."""
    if callable(targets):
        return [name for name, layer in layers.items() if targets(name, layer)]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(f"{setting} {targets!r} is not a regular expression: {error}") from error
        return [name for name in layers if pattern.fullmatch(name)]
    return [name for name in layers if any(answers_to(name, target) for target in targets)]


def _all_linear(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every linear layer but the output head, those with a forward of their own too."""
    head = output_head(model)
    linear = {name: layer for name, layer in layers.items() if isinstance(kind_of(layer), LinearKind)}
    own = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and has_own_forward(m)}
    return {name: layer for name, layer in (linear | own).items() if layer is not head}


def _targeted(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    layers = _adaptable(model)
    _check_no_strange_stack_is_meant(model, targets, layers)
    if targets == ALL_LINEAR:
        targeted = _all_linear(model, layers)
    else:
        _check_convolutions_meant(model, targets)
        if not isinstance(targets, str) and not callable(targets):
            check_all_matched("target_modules", targets, layers)
        targeted = {name: layers[name] for name in _meant("target_modules", targets, layers)}
    if not targeted:
        check_all_matched("target_modules", [str(targets)], layers)
        raise TargetError(f"target_modules {targets!r} matched no layer")
    return targeted


def _idle(config: LoraConfig, targeted: Mapping[str, nn.Module], excluded: set[str]) -> list[str]:
    """A sentence for each of `layers_to_transform` and `exclude_modules` with something in it that decides nothing."""
    sentences = []
    within = list(targeted)
    if config.layers_to_transform is not None:
        has = {number for name in targeted if name not in excluded and (number := block_number(name)) is not None}
        if idle := sorted(set(config.layers_to_transform) - has):
            blocks = f"blocks {min(has)} to {max(has)}" if has else "no numbered block"
            sentences.append(f"layers_to_transform {idle} hold nothing to adapt; what is targeted lies in {blocks}")
        within = [name for name in within if block_number(name) in config.layers_to_transform]
    exclude = config.exclude_modules
    if exclude is not None:
        whole = isinstance(exclude, str) or callable(exclude)
        left = [str(exclude)] if whole and not excluded.intersection(within) else []
        if not isinstance(exclude, str) and not callable(exclude):
            left = [entry for entry in exclude if not any(answers_to(name, entry) for name in within)]
        if left:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in within})) or "none"
            sentences.append(f"exclude_modules {left} excludes no targeted layer; targeted are: {ends}")
    return sentences


def select_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the layers that get an adapter: target_modules without exclude_modules, in the blocks of
    `layers_to_transform` (see LoraConfig).

    Raises TargetError that lists what matched or decided nothing. The model has no adapters yet.
    """
    targeted = _targeted(model, config.target_modules)
    excluded: set[str] = set()
    if config.exclude_modules is not None:
        excluded.update(_meant("exclude_modules", config.exclude_modules, targeted))
    if sentences := _idle(config, targeted, excluded):
        raise TargetError("; ".join(sentences))
    chosen = {
        name: layer
        for name, layer in targeted.items()
        if name not in excluded
        and (config.layers_to_transform is None or block_number(name) in config.layers_to_transform)
    }
    if not chosen:
        raise TargetError(f"exclude_modules leaves none of the {len(targeted)} targeted layers")
    _check_no_linear_is_left_out(chosen)
    _check_called(model, list(chosen))
    return list(chosen)
