"""Rows of made-up tokens, on which a model is tried before it is trained, whatever its batches hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.compute.devices import model_device
from qlora_lite.data.batching import Batch, has_images
from qlora_lite.positions import longest_sequence
from qlora_lite.signals import check_signals
from qlora_lite.surgery import modes_restored

TOKEN_STRIDE = 7919  # a prime, so that neighbouring tokens are far apart and different
VARIANTS = 8
# Changes by rounding scatter: the largest of many is a few times the largest of others.
NOISE_FACTOR = 8
# What rounding in fp32 may change an output by, also where the tokens of other rows happen to change nothing.
ROUNDING = 1e-5

# What a batch of text may have. With anything else, as pictures, layers may run that text alone does not reach.
TEXT_INPUTS = {"input_ids", "labels", "attention_mask", "position_ids"}

Outputs = Callable[[Tensor], Tensor]


def text_of(batch: Batch) -> Batch:
    """Returns a batch without its images; without their values, the tokens of images are tokens like others."""
    return {name: value for name, value in batch.items() if name in TEXT_INPUTS} if has_images(batch) else batch


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode; afterwards its modes and the random states are as before.

    Products in integers are off: they treat columns of large values apart, and all tokens of a batch decide on these.
    """
    in_integers: list[Any] = [module for module in model.modules() if getattr(module, "int8_activations", False)]
    device = model_device(model)
    generators: list[Any] = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    states, python_state = [generator.get_rng_state() for generator in generators], random.getstate()
    with modes_restored(model):
        model.eval()
        for module in in_integers:
            module.int8_activations = False
        try:
            yield
        finally:
            random.setstate(python_state)
            for generator, state in zip(generators, states, strict=True):
                generator.set_rng_state(state)
            for module in in_integers:
                module.int8_activations = True


class MadeUpRows:
    """Makes token ids for a model. They come from the middle half of the vocabulary; special tokens are at its ends."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.device = batch["input_ids"].device
        vocabulary = architecture.vocabulary_size(model) or int(batch["input_ids"].max()) + 1
        self._first, self._count = vocabulary // 4, max(1, vocabulary // 2)

    def tokens(self, rows: int, length: int, variant: int = 0) -> Tensor:
        """Returns token ids of shape (rows, length). Each variant has another token in every place."""
        numbers = torch.arange(rows * length, device=self.device).view(rows, -1)
        return self._first + (numbers * TOKEN_STRIDE + variant * self._count // VARIANTS) % self._count

    def noise(self, length: int, outputs: Outputs) -> float:
        """Returns how much the outputs of a row change with the tokens of another row, which must be by rounding.

        They do in mixtures of experts: the tokens of all rows decide how many an expert multiplies together.
        outputs: computes (rows, tokens, features) from token ids.
        """
        tokens = self.tokens(2, length)
        expected = outputs(tokens)
        found = []
        for variant in range(1, VARIANTS):
            row = variant % 2
            others = self.tokens(2, length, variant)
            others[row] = tokens[row]
            found.append(changes(outputs(others)[row], expected[row]).max())
        return float(torch.stack(found).max())

    def change(self, found: Tensor, expected: Tensor, length: int, outputs: Outputs) -> float | None:
        """Returns by what part of their norm outputs (rows, tokens, features) differ; None if by rounding.

        length, outputs: as of `noise`.
        """
        seen = changes(found, expected)
        most = float(seen.max())
        if most <= (ROUNDING if found.dtype == torch.float32 else 0.0):
            return None
        # Rounding sends a token to another expert at random places; what a model does wrong it does in every row.
        noise = self.noise(length, outputs)
        return None if noise > 0 and float(seen.amin(0).max()) <= NOISE_FACTOR * noise else most


def changes(found: Tensor, expected: Tensor) -> Tensor:
    """Returns by what part of its norm each output differs: (..., tokens), from (..., tokens, features)."""
    found, expected = found.float(), expected.float()
    norms = expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    difference: Tensor = (found - expected).norm(dim=-1) / norms
    return difference


def states_of(model: nn.Module, inputs: Batch) -> Tensor:
    """Returns the last hidden states (rows, tokens, features).

    Returns the logits of a model that does not say which part of it computes hidden states.
    """
    check_signals()
    if architecture.base_model(model) is not model:
        return architecture.hidden_states(model, inputs)
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def length_within(model: nn.Module, lengths: Sequence[int]) -> list[int]:
    """Returns the lengths of examples, shortened in proportion so that one row of the model holds them all."""
    longest = longest_sequence(getattr(model, "config", None))
    room = sum(lengths) if longest is None else min(longest, sum(lengths))
    return [max(1, length * room // sum(lengths)) for length in lengths]


def was_rehearsed(model: nn.Module, before: WeakSet[nn.Module]) -> bool:
    """Returns whether the model is in the set, and puts it there.

    On fake tensors, what a probe compares has no value. It runs for its memory alone, which is the same each time.
    """
    was_in = model in before
    before.add(model)
    return was_in
