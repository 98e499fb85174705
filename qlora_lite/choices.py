"""Choices between computations of the same result: the alternatives, and which of them are in force.

On one processor torch's attention is three times as fast as ours, on another ours is. Each choice has a key, the name
of the computation with the class of its shapes: `attention_forward.bf16.medium`. The computations ask `chosen` for
their key. Alternatives differ by rounding, so a run takes the same ones until its end, also when it is resumed.

Outside of `choices_in_force` the defaults hold, and on an accelerator they always do. choosing/ measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from qlora_lite.errors import ConfigError

Choices = Mapping[str, str]  # the alternative of each key


class Alternatives(NamedTuple):
    """names: of the alternatives, the default first. classes: of shapes, which are chosen for apart; () if all alike.

    explained: what is chosen, in a few words.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    explained: str


ATTENTION_FORWARD, ATTENTION_BACKWARD, INTEGER_PRODUCTS = "attention_forward", "attention_backward", "integer_products"
LARGE_PRODUCTS, TORCH = "large_products", "torch"
INT_MM, FP32 = "int_mm", "fp32"

# The most tokens of a row in a class of attention; what is longer is in the last one.
ATTENTION_TOKENS = {"short": 256, "medium": 1024}
ATTENTION_CLASSES = tuple(
    f"{dtype}.{length}" for dtype in ("bf16", "fp32") for length in (*ATTENTION_TOKENS, "long")
)  # of queries in this dtype

ALTERNATIVES = {
    ATTENTION_FORWARD: Alternatives((LARGE_PRODUCTS, TORCH), ATTENTION_CLASSES, "the kernel of causal attention"),
    ATTENTION_BACKWARD: Alternatives((LARGE_PRODUCTS, TORCH), ATTENTION_CLASSES, "the kernel of its gradients"),
    INTEGER_PRODUCTS: Alternatives((INT_MM, FP32), (), "products of int8 codes with int8 activations"),
}


def keys_of(name: str) -> list[str]:
    """Returns the keys of a computation in ALTERNATIVES."""
    return [f"{name}.{shapes}" for shapes in ALTERNATIVES[name].classes] or [name]


NAMES = {key: alternatives.names for name, alternatives in ALTERNATIVES.items() for key in keys_of(name)}
DEFAULTS: Choices = {key: names[0] for key, names in NAMES.items()}

_in_force: ContextVar[Choices] = ContextVar("choices between equal computations", default=DEFAULTS)


def chosen(key: str) -> str:
    """Returns the alternative in force for a key."""
    return _in_force.get()[key]


@contextmanager
def choices_in_force(choices: Choices) -> Iterator[None]:
    """Within the block these alternatives are used. choices: for every key."""
    token = _in_force.set(choices)
    try:
        yield
    finally:
        _in_force.reset(token)


def unknown_choices(choices: Mapping[str, object]) -> list[str]:
    """Returns what is wrong with choices that were read: keys that do not exist, and alternatives that a key lacks."""
    return [
        f"{key}={name} (known are: {', '.join(NAMES[key])})" if key in NAMES else f"{key}={name} (there is no such key)"
        for key, name in choices.items()
        if name not in NAMES.get(key, ())
    ]


def attention_class(dtype: str, tokens: int) -> str:
    """Returns the class of shapes of causal attention. dtype: `bf16` or `fp32`."""
    return f"{dtype}.{next((name for name, most in ATTENTION_TOKENS.items() if tokens <= most), 'long')}"


def with_overrides(choices: Choices, text: str) -> Choices:
    """Returns choices with those of a text such as `attention_forward=torch,integer_products=fp32` in their place.

    A name without a class of shapes stands for all of its classes. Raises ConfigError, which lists what is known.
    """
    own = dict(choices)
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, alternative = (word.strip() for word in part.partition("="))
        keys = keys_of(name) if name in ALTERNATIVES else [name] if name in NAMES else []
        if not keys:
            known = ", ".join(dict.fromkeys((*ALTERNATIVES, *NAMES)))
            raise ConfigError(f"there is no choice named {name!r}; known are: {known}")
        if alternative not in NAMES[keys[0]]:
            raise ConfigError(f"{name} must be one of {', '.join(NAMES[keys[0]])}; got {alternative!r}")
        own |= dict.fromkeys(keys, alternative)
    return own
