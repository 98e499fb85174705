"""Settings as small frozen dataclasses that check themselves; every wrong one raises ConfigError at construction."""

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
BIASES = ("none", "all", "lora_only")
INITS = ("normal", "kaiming", "gaussian", "orthogonal", "pissa", "loftq")
LOFTQ_ITERATIONS = re.compile(r"loftq:([1-9][0-9]{0,3})")
# A is (rank, in): beyond the widest layers there are, a rank only takes memory.
MAX_RANK = 2**16

Number = TypeVar("Number", int, float)
Targets = str | Sequence[str] | Callable[[str, torch.nn.Module], bool]


def check_rank(what: str, rank: object) -> None:
    """ConfigError that begins with `what` for a rank that is no integer of at least 1, or a hopelessly large one."""
    require(is_count(rank, 1), f"{what} must be an integer of at least 1", rank)
    require(rank <= MAX_RANK, f"{what} must be at most {MAX_RANK}", rank)  # type: ignore[operator]


def check_alpha(what: str, alpha: object) -> None:
    """ConfigError that begins with `what` for an alpha that is no finite number."""
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
    """The bounds that every LoRA layer has: rank >= 1, alpha finite, 0 <= dropout < 1."""
    check_rank("rank", rank)
    check_alpha("alpha", alpha)
    require(is_finite(dropout) and 0 <= dropout < 1, "dropout must be in [0, 1)", dropout)  # type: ignore[operator]


def parse_init(init: str) -> tuple[str, int]:
    """(`loftq`, 5) of `loftq:5`: the start's name and how many iterations it takes; one where it does not say."""
    rounds = LOFTQ_ITERATIONS.fullmatch(init) if isinstance(init, str) else None
    return (init, 1) if rounds is None else ("loftq", int(rounds[1]))


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get an adapter, and of what size and scale (see LoraLayer).

    target_modules: `"all-linear"` (every linear layer but the output head, and no stack of experts; peft takes the
        stacks and the router in with some families, under another rank); another string is a regular expression
        that must match a layer's whole name; a list names layers by their whole name or its last parts;
        these may mean convolutions too; a function `(name, module) -> bool` decides itself. A stack of experts'
        matrices is a layer of its own name, `model.layers.0.mlp.experts.gate_up_proj`: peft's target_parameters. It
        has no dropout and only the variant `lora`.
    exclude_modules: which of those are left out, said in the same ways but `"all-linear"`.
    layers_to_transform: numbers of the repeated blocks that get adapters: the first number in a layer's name, 7 in
        `model.layers.7.mlp.up_proj`. Layers outside of the blocks then get none. A number or an exclusion that
        decides nothing is an error (TargetError of `add_lora_`).
    adapter_dtype: what A and B are stored and updated in; activations keep the dtype of the layer's input.
    use_rslora: scale by alpha / sqrt(rank) in place of alpha / rank, so that a high rank learns as fast as a low one.
    rank_pattern, alpha_pattern: {pattern: number} for layers that get another rank or alpha than the others, as in
        peft: a pattern is a regular expression for a layer's whole name or its last parts, and the first one that
        matches decides. One that decides for no adapted layer is an error (TargetError of `add_lora_`).
    init_lora_weights: how A and B start (init.py): `normal` (A from N(0, 0.02), B zero); `kaiming`, `gaussian`,
        `orthogonal` as peft does; `pissa`, with the principal part of the base; `loftq`, making up for the error of
        packing, which reads the checkpoint that the model was loaded from; `loftq:5`, that in five iterations, which
        packs the base anew: the adapter then belongs to that base and to no other (base_identity.py).
    variant: of LoRA, by its name (variants.py): `lora` is the plain one.
    modules_to_save: names of modules, whole or their last parts, that are trained themselves (peft's modules_to_save):
        norms (`input_layernorm`, `model.norm`), an output head, a classifier. A trained copy in adapter_dtype lies,
        unpacked, beside each frozen original. One of two tied modules leaves the other as it is; both get a copy each.
    bias: trains biases too, copies of them: `lora_only` of the adapted layers, `all` of every module.
    trainable_token_indices: tokens whose rows of the input embedding are trained, and those of a head that is tied
        to it: memory for these rows only.
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
            require(self.exclude_modules != ALL_LINEAR, "exclude_modules must leave a layer", ALL_LINEAR)
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
        """The rank of the adapter on the layer of this name."""
        return _number_of(name, self.rank_pattern, self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of the adapter on the layer of this name."""
        return _number_of(name, self.alpha_pattern, self.alpha)

    def idle_patterns(self, names: Collection[str]) -> list[str]:
        """A sentence for each setting with patterns that decide for none of these layers."""
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
