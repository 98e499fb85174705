"""Keys and values of a conversation, kept for its next turn.

The prompt of a turn repeats the turns before it. Keys and values of a token depend on it and on the tokens before it,
so those of the longest common prefix of two prompts are the same, and the next answer computes only what is behind it.
A chat template that rewrites history makes the prefix shorter.

What cannot be shortened is not kept, and the next prompt is computed whole: the states of recurrent layers, and caches
of a sliding window that has moved on (they serve a prompt that goes on where they end). Neither is kept what depends on
the length of a prompt: positions that are scaled by it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from qlora_lite.lora.layer import LoraLayer

# transformers' layers of a cache whose end can be cut off; others, and what is derived from them, have more than keys
# and values, or another form.
CUT = ("DynamicLayer", "DynamicSlidingWindowLayer")
SCALED_BY_LENGTH = ("dynamic", "longrope")

State = list[object]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def _rope_types(entries: object) -> Iterator[object]:
    """The types of rotary positions in a config's entry, which may have one for each kind of layer."""
    if isinstance(entries, dict):
        yield from (entries[name] for name in ("rope_type", "type") if name in entries)
        for value in entries.values():
            yield from _rope_types(value)


def _can_be_cut(model: nn.Module, cache: Any) -> bool:
    """Whether `crop` leaves what the model computes for the shorter prompt."""
    layers = getattr(cache, "layers", None)
    if type(cache).__name__ != "DynamicCache" or not layers or any(type(layer).__name__ not in CUT for layer in layers):
        return False
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    found = [getattr(text, name, None) for name in ("rope_parameters", "rope_scaling")]
    return not any(kind in SCALED_BY_LENGTH for entries in found for kind in _rope_types(entries))


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _state(model: nn.Module) -> State:
    """What keys and values depend on besides tokens: each weight and its version, and how adapters are used."""
    versions = [(weakref.ref(weight), -1 if weight.is_inference() else weight._version) for weight in _weights(model)]
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return [*versions, *((layer.adapter_enabled, layer.scaling) for layer in layers)]


class KeptCache:
    """The cache of one conversation, in the memory that the answer needed anyway.

    It serves one model as it is: after a change of a weight, another adapter, or another model, nothing is reused. A
    change through `.data` is not seen; `drop` the cache then.
    """

    def __init__(self) -> None:
        self._cache: Any = None
        self._tokens: list[int] = []
        self._state: State = []

    @property
    def tokens(self) -> int:
        """The number of tokens whose keys and values are kept."""
        return len(self._tokens)

    def drop(self) -> None:
        """Forgets the conversation."""
        self._cache, self._tokens, self._state = None, [], []

    def take(self, model: nn.Module, prompt: Sequence[int]) -> Any:
        """Returns the cache of the prefix of a prompt, None if nothing can be reused. It is not kept any longer.

        At least one token is left to compute, whose logits begin the answer.
        """
        cache, tokens, state = self._cache, self._tokens, self._state
        self.drop()
        if cache is None or state != _state(model):
            return None
        length = min(_common(tokens, prompt), len(prompt) - 1)
        surplus = len(tokens) - length
        moved_on = any(
            layer.is_sliding and layer.get_seq_length() >= layer.sliding_window
            for layer in cache.layers
            if layer.is_initialized
        )
        if not length or (surplus and moved_on):
            return None
        if surplus:
            cache.crop(-surplus)
        return cache

    def keep(self, model: nn.Module, cache: Any, tokens: Sequence[int]) -> None:
        """Keeps the cache of an answer, if it can be reused. tokens: prompt and answer, of which the last is not in."""
        self.drop()
        if _can_be_cut(model, cache) and cache.get_seq_length() == len(tokens) - 1:
            self._cache, self._tokens, self._state = cache, [*tokens[:-1]], _state(model)
