"""LoraConfig: which layers get adapters, of what size, and what else is trained. It checks itself at construction."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from qlora_lite.checks import FLOAT_DTYPES, is_count, is_finite, require
from qlora_lite.errors import ConfigError
from qlora_lite.lora.variants import VARIANTS, check_bias, check_variant
from qlora_lite.surgery import layer_pattern, matching_pattern

ALL_LINEAR = "all-linear"
ALL_LINEAR_WITH_TOWERS = "all-linear-with-towers"
BIASES = ("none", "all", "lora_only")
INITS = ("normal", "kaiming", "gaussian", "orthogonal", "pissa", "loftq")
LOFTQ_ITERATIONS = re.compile(r"loftq:([1-9][0-9]{0,3})")
# Above the width of the widest layers, a rank costs memory and adds nothing.
MAX_RANK = 2**16

Number = TypeVar("Number", int, float)
Targets = str | Sequence[str] | Callable[[str, torch.nn.Module], bool]


def check_rank(what: str, rank: object) -> None:
    """Raises ConfigError, which starts with `what`, unless rank is an integer in [1, MAX_RANK]."""
    require(is_count(rank, 1), f"{what} must be an integer of at least 1", rank)
    require(rank <= MAX_RANK, f"{what} must be at most {MAX_RANK}", rank)  # type: ignore[operator]


def check_alpha(what: str, alpha: object) -> None:
    """Raises ConfigError, which starts with `what`, unless alpha is a finite number."""
    require(is_finite(alpha), f"{what} must be a finite number", alpha)


def _check_patterns(setting: str, patterns: object, check: Callable[[str, object], None]) -> None:
    if not isinstance(patterns, Mapping) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{setting} must map patterns of layer names to numbers; got {patterns!r}")
    for pattern, number in patterns.items():
        check(f"{setting} {pattern!r}", number)
        try:
            layer_pattern(pattern)
        except re.error as error:
            raise ConfigError(f"{setting} {pattern!r} is not a regular expression: {error}") from error


def _number_of(name: str, patterns: Mapping[str, Number], otherwise: Number) -> Number:
    pattern = matching_pattern(patterns, name)
    return otherwise if pattern is None else patterns[pattern]


def _check_targets(setting: str, targets: object) -> None:
    if callable(targets):
        return
    listed = isinstance(targets, (str, list, tuple, set, frozenset)) and bool(targets)
    named = listed and all(isinstance(name, str) for name in targets)  # type: ignore[attr-defined]
    require(named, f"{setting} must be a string, a list of names or a function", targets)


def check_lora_numbers(rank: object, alpha: object, dropout: object) -> None:
    """Raises ConfigError unless rank >= 1, alpha is finite and 0 <= dropout < 1."""
    check_rank("rank", rank)
    check_alpha("alpha", alpha)
    require(is_finite(dropout) and 0 <= dropout < 1, "dropout must be in [0, 1)", dropout)  # type: ignore[operator]


def parse_init(init: str) -> tuple[str, int]:
    """Returns the name of an initialization and its number of iterations: (`loftq`, 5) for `loftq:5`, else 1."""
    rounds = LOFTQ_ITERATIONS.fullmatch(init) if isinstance(init, str) else None
    return (init, 1) if rounds is None else ("loftq", int(rounds[1]))


@dataclass(frozen=True)
class LoraConfig:
    """The layers that get an adapter, its size and scale (see LoraLayer), and what else is trained.

    target_modules: `"all-linear"` means every linear layer except the output head, and no stack of experts (for some
        families, peft adapts the stacks and the router too, with another rank). Of a vision-language model it means
        the language model; `"all-linear-with-towers"` adds the vision tower and the projector, which only images
        reach, or an audio encoder. Another string is a regular expression
        for the whole name of a layer. A list names layers by their whole name or its last parts. Both may select
        convolutions too. A function `(name, module) -> bool` decides by itself. A stack of experts' matrices has its
        own name, `model.layers.0.mlp.experts.gate_up_proj` (peft: target_parameters), no dropout, and the variant
        `lora` only.
    exclude_modules: the targets to leave out, given in the same ways except `"all-linear"`. A name in a list may be any
        part of a path: `vision_tower` leaves out `model.vision_tower.layers.0.q_proj`.
    layers_to_transform: numbers of the repeated blocks that get adapters. The number of a block is the first number in
        a layer's name: 7 in `model.layers.7.mlp.up_proj`. Layers outside of the blocks get none. `add_lora_` raises
        TargetError for a number or an exclusion that changes nothing.
    adapter_dtype: the dtype in which A and B are stored and updated. Activations keep the dtype of the layer's input.
    use_rslora: scale by alpha / sqrt(rank) instead of alpha / rank, so that a high rank learns as fast as a low one.
    rank_pattern, alpha_pattern: {pattern: number} for layers with another rank or alpha, as in peft. A pattern is a
        regular expression for the whole name of a layer or its last parts. The first one that matches decides.
        `add_lora_` raises TargetError for a pattern that decides for no adapted layer.
    init_lora_weights: the initialization of A and B (init.py). `normal`: A from N(0, 0.02), B zero. `kaiming`,
        `gaussian`, `orthogonal`: those of peft. `pissa`: the principal part of the base. `loftq`: the principal part of
        the packing error, which needs the checkpoint that the model was loaded from. `loftq:5`: five iterations of
        that, which pack the base again; the adapter then belongs to that base only (checkpoints/base_identity.py).
    variant: `lora`, or the name of a variant that trains more than A and B (variants.py).
    modules_to_save: names of modules, whole or their last parts, that are trained in full: norms (`input_layernorm`,
        `model.norm`), an output head, a classifier. Each gets a trained, unpacked copy in adapter_dtype next to the
        frozen original. Tied modules get a copy each; a copy of one leaves the other as it is.
    bias: `lora_only` trains copies of the biases of the adapted layers, `all` of every module, `none` none.
    trainable_token_indices: tokens whose rows of the input embedding are trained, and those of a head that is tied to
        it. Only these rows take memory.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: Targets = ALL_LINEAR
    adapter_dtype: torch.dtype = torch.float32
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init_lora_weights: str = "normal"
    variant: str = "lora"
    exclude_modules: Targets | None = None
    layers_to_transform: Sequence[int] | None = None
    modules_to_save: Sequence[str] = ()
    bias: str = "none"
    trainable_token_indices: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_lora_numbers(self.rank, self.alpha, self.dropout)
        dtypes = tuple(FLOAT_DTYPES.values())
        require(self.adapter_dtype in dtypes, "adapter_dtype must be a 16/32-bit float dtype", self.adapter_dtype)
        _check_targets("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            _check_targets("exclude_modules", self.exclude_modules)
            everything = (ALL_LINEAR, ALL_LINEAR_WITH_TOWERS)
            require(self.exclude_modules not in everything, "exclude_modules must leave a layer", self.exclude_modules)
        if (numbers := self.layers_to_transform) is not None:
            listed = isinstance(numbers, Sequence) and len(numbers) > 0 and all(is_count(n, 0) for n in numbers)
            require(listed, "layers_to_transform must be None or a list of numbers of at least 0", numbers)
        require(isinstance(self.use_rslora, bool), "use_rslora must be True or False", self.use_rslora)
        check_variant(self.variant)
        start = parse_init(self.init_lora_weights)[0]
        require(
            start in INITS, f"init_lora_weights must be one of {', '.join(INITS)}, or loftq:N", self.init_lora_weights
        )
        require(self.bias in BIASES, f"bias must be one of {', '.join(BIASES)}", self.bias)
        check_bias(VARIANTS[self.variant], self.bias)
        whole = self.modules_to_save
        names_only = not isinstance(whole, str) and all(isinstance(name, str) and name for name in whole)
        require(names_only, "modules_to_save must be a sequence of module names", whole)
        tokens = list(self.trainable_token_indices)
        require(
            all(is_count(token, 0) for token in tokens), "trainable_token_indices must be token numbers from 0", tokens
        )
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        require(not twice, "trainable_token_indices must name each token once", twice)
        _check_patterns("rank_pattern", self.rank_pattern, check_rank)
        _check_patterns("alpha_pattern", self.alpha_pattern, check_alpha)

    def rank_of(self, name: str) -> int:
        """Returns the rank of the adapter on the layer of this name."""
        return _number_of(name, self.rank_pattern, self.rank)

    def alpha_of(self, name: str) -> float:
        """Returns the alpha of the adapter on the layer of this name."""
        return _number_of(name, self.alpha_pattern, self.alpha)

    def unused_patterns(self, names: Collection[str]) -> list[str]:
        """Returns a sentence for each setting with patterns that decide for none of these layers."""
        sentences = []
        for setting, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            deciding = {matching_pattern(patterns, name) for name in names}
            if idle := [pattern for pattern in patterns if pattern not in deciding]:
                has = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
                sentences.append(
                    f"{setting} {idle} decides for no adapted layer (the first pattern that matches does); "
                    f"adapted are: {has}"
                )
        return sentences
