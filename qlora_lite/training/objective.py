"""The loss that a model is trained with: without logits if that equals the model's own loss, else the model's own.

Both are sums over labelled tokens, so that the gradients of several batches add up to those of one large batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qlora_lite import architecture
from qlora_lite.compute.cross_entropy import linear_cross_entropy
from qlora_lite.data.batching import Batch, labelled_tokens
from qlora_lite.errors import ConfigError
from qlora_lite.lora.auxiliary_layers import TrainableTokensLayer, TrainedCopy
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.signals import check_signals
from qlora_lite.surgery import has_own_forward

Loss = Callable[[nn.Module, Batch], Tensor]

PROBE_TOKENS = 64
# bf16 has 8 significant bits: two orders of summation differ by about 2^-8 in a logit, and by less in a mean loss.
PROBE_TOLERANCE = 5e-3

# Made-up rows: examples longer than convolutions reach, whose lengths are no multiples of the sizes of blocks.
MADE_UP_LENGTHS = (19, 23, 17)
TOKEN_STRIDE = 7919  # a prime, so that neighbouring tokens are far apart and different
VARIANTS = 8
# Changes by rounding scatter: the largest of many is a few times the largest of others.
NOISE_FACTOR = 8
# Of the median token. In bf16, 30 layers and eight layers of experts differ by 0.01 at most.
ALONE_TOLERANCE = 0.05
WITHOUT_PACKING = "train with packing=False, and give position_ids only with packed rows"

# Models whose probes have run on fake tensors. What they compare has no value there, so a probe runs for its memory
# alone, which is the same each time.
_rehearsed_losses: WeakSet[nn.Module] = WeakSet()
_rehearsed_packing: WeakSet[nn.Module] = WeakSet()


def logit_free_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the sum of the cross-entropy over labelled tokens, from the last hidden states and the head's weight.

    The logits of all tokens are never in memory (`linear_cross_entropy`).
    """
    head: Any = architecture.output_head(model)
    hidden = architecture.hidden_states(model, batch)[:, :-1]
    lora = replaced = None
    if isinstance(head, LoraLayer) and head.adapter_enabled and not head.merged:
        lora = (*head.factors, head.scaling)
    if isinstance(head, TrainableTokensLayer) and head.adapter_enabled:
        replaced = (head.rows.tokens, head.rows.values)
    hidden = hidden.to(getattr(_base_of(head), "compute_dtype", None) or hidden.dtype)
    options: Any = architecture.logit_options(model)
    return linear_cross_entropy(
        hidden,
        head.weight,
        batch["labels"][:, 1:],
        head.bias,
        lora=lora,
        replaced=replaced,
        reduction="sum",
        **options,
    )


def _base_of(head: nn.Module) -> nn.Module:
    """Returns the head without its adapter or trained copy."""
    return head.base_layer if isinstance(head, (LoraLayer, TrainedCopy, TrainableTokensLayer)) else head


def _needs_logits_reason(model: nn.Module) -> str | None:
    """Returns why the loss cannot be computed from the last hidden states and the head's weight; None if it may be."""
    head = architecture.output_head(model)
    if head is None or getattr(model, "base_model", model) is model:
        return "the model does not say which module is its output head"
    base = _base_of(head)
    if not (hasattr(base, "in_features") and hasattr(base, "weight")) or has_own_forward(base):
        return f"its output head is a {type(head).__name__}"
    if isinstance(head, LoraLayer) and head.variant.gain is not None:
        return f"the adapter of its output head is of variant {head.variant.name}"
    if isinstance(head, LoraLayer) and head.dropout > 0:
        return "the adapter of its output head has dropout"
    return None


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the loss that the model computes itself, a mean over labelled tokens, times their number.

    Raises ConfigError if the model does not return a loss.
    """
    loss = getattr(model(**batch, use_cache=False), "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(f"a {type(model).__name__} returns no loss for labels; train needs a causal language model")
    return loss * labelled_tokens(batch)


@torch.no_grad()
def _probe(model: nn.Module, batch: Batch) -> str | None:
    """Compares both losses on the start of one row; returns how they differ, None if they agree.

    The labels are the tokens that the model finds most likely, because their loss depends most on the logits. For
    unlikely tokens the loss of an untrained model is about the logarithm of the vocabulary size, whatever it computes.
    """
    row = {name: value[:1, :PROBE_TOKENS] for name, value in batch.items()}
    row["labels"] = row["input_ids"].clone()
    training = model.training
    model.eval()
    try:
        logits = getattr(model(**row, use_cache=False), "logits", None)
        if isinstance(logits, Tensor) and logits.shape[:2] == row["labels"].shape:
            row["labels"][:, 1:] = logits[:, :-1].argmax(-1)
        check_signals()
        expected = float(model_loss(model, row))
        check_signals()
        found = float(logit_free_loss(model, row))
    finally:
        model.train(training)
    if abs(expected - found) <= PROBE_TOLERANCE * abs(expected):
        return None
    return f"on a probe its own loss is {expected:.6g} and the one without logits {found:.6g}"


def is_packed(batch: Batch) -> bool:
    """Whether a batch is laid out like one of `batches` with packing, however many examples its rows hold."""
    positions = batch.get("position_ids")
    return positions is not None and positions.dim() == 2 and "attention_mask" not in batch


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the model is in evaluation mode; afterwards its modes and the random states are as before.

    Products in integers are off: they treat columns of large values apart, and all tokens of a batch decide on these.
    """
    modes = {module: module.training for module in model.modules()}
    in_integers: list[Any] = [module for module in modes if getattr(module, "int8_activations", False)]
    generators: list[Any] = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    states, python_state = [generator.get_rng_state() for generator in generators], random.getstate()
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
        for module, training in modes.items():
            module.training = training


class _MadeUpRows:
    """Rows of three examples each, of made-up tokens, and what a model makes of them.

    The tokens come from the middle half of the vocabulary, because special tokens are at its ends.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.device = model, batch["input_ids"].device
        vocabulary = architecture.vocabulary_size(model) or int(batch["input_ids"].max()) + 1
        self._first_token, self._tokens = vocabulary // 4, max(1, vocabulary // 2)
        longest = architecture.longest_sequence(getattr(model, "config", None))
        room = sum(MADE_UP_LENGTHS) if longest is None else min(longest, sum(MADE_UP_LENGTHS))
        self.lengths = [max(1, length * room // sum(MADE_UP_LENGTHS)) for length in MADE_UP_LENGTHS]
        self.second = slice(self.lengths[0], sum(self.lengths[:2]))

    def tokens(self, rows: int, variant: int = 0) -> Tensor:
        """Returns token ids of shape (rows, tokens). Each variant has another token in every place."""
        numbers = torch.arange(rows * sum(self.lengths), device=self.device).view(rows, -1)
        return self._first_token + (numbers * TOKEN_STRIDE + variant * self._tokens // VARIANTS) % self._tokens

    def outputs(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Returns the hidden states (rows, tokens, features) of packed rows of examples of these lengths.

        Returns the logits of a model that does not say which part of it computes hidden states.
        Raises ConfigError if the model does not take such rows.
        """
        check_signals()
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        inputs = {"input_ids": tokens, "position_ids": positions.repeat(len(tokens), 1)}
        model: Any = self.model
        try:
            if getattr(model, "base_model", model) is not model:
                return architecture.hidden_states(model, inputs)
            logits: Tensor = model(**inputs, use_cache=False).logits
        except (TypeError, ValueError, AttributeError) as error:
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ConfigError(
                f"a {type(model).__name__} does not take packed rows ({why}); {WITHOUT_PACKING}"
            ) from error
        return logits

    def noise(self) -> float:
        """Returns how much the outputs of a row change with the tokens of another row, which must be by rounding.

        They do in mixtures of experts: the tokens of all rows decide how many an expert multiplies together.
        """
        tokens = self.tokens(2)
        expected = self.outputs(tokens, self.lengths)[:1]
        changes = []
        for variant in range(1, VARIANTS):
            tokens = torch.cat([tokens[:1], self.tokens(2, variant)[1:]])
            changes.append(_changes(self.outputs(tokens, self.lengths)[:1], expected).max())
        return float(torch.stack(changes).max())


def _changes(found: Tensor, expected: Tensor) -> Tensor:
    """Returns by what part of its norm each output differs: (rows, tokens), from (rows, tokens, features)."""
    found, expected = found.float(), expected.float()
    norms = expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    changes: Tensor = (found - expected).norm(dim=-1) / norms
    return changes


@torch.no_grad()
def check_packing(model: nn.Module, batch: Batch, rows: int) -> None:
    """Raises ConfigError if a model computes packed examples other than alone, so that batches like this are wrong.

    This is tried on made-up rows, whatever the batch holds. The hidden states of the second of three examples must not
    change by a bit with the tokens of its neighbours. If they change with those of another row, which is rounding, they
    may change by a few times as much. They must also be those of the example in a row of its own, up to rounding.
    The model and the random states are afterwards as before.
    rows: of the made-up batch; 1, or 2 for batches of several rows, for which some attention functions do not pack.
    """
    made_up = _MadeUpRows(model, batch)
    is_fake = isinstance(batch["input_ids"], FakeTensor)
    if is_fake and _was_rehearsed(model, _rehearsed_packing):
        return
    second, lengths, tokens = made_up.second, made_up.lengths, made_up.tokens(rows)
    others = made_up.tokens(rows, 1)
    others[:, second] = tokens[:, second]
    with _undisturbed(model, made_up.device):
        packed = made_up.outputs(tokens, lengths)[:, second]
        among_others = made_up.outputs(others, lengths)[:, second]
        alone = made_up.outputs(tokens[:, second], lengths[1:2])
        if is_fake:
            return
        if not all(outputs.isfinite().all() for outputs in (packed, among_others, alone)):
            raise ConfigError(f"a {type(model).__name__} computes NaN or infinity for packed rows; {WITHOUT_PACKING}")
        seen = _changes(among_others, packed)
        # Rounding sends a token to another expert at random places; what a model does wrong it does in every row.
        if seen.any() and (not (noise := made_up.noise()) or float(seen.amin(0).max()) > NOISE_FACTOR * noise):
            raise ConfigError(
                f"a {type(model).__name__} lets packed examples see each other: other tokens in its neighbours changed "
                f"the hidden states of an example by {float(seen.max()):.1g} of their norm; {WITHOUT_PACKING}"
            )
        differs = float(_changes(packed, alone).median())
        if differs > ALONE_TOLERANCE:
            raise ConfigError(
                f"a {type(model).__name__} computes packed examples other than alone: the hidden states of an example "
                f"differ by {differs:.1g} of their norm, although its neighbours do not change them, so the model does "
                f"not follow position_ids; {WITHOUT_PACKING}"
            )


def _was_rehearsed(model: nn.Module, before: WeakSet[nn.Module]) -> bool:
    """Returns whether the model is in the set, and puts it there."""
    was_rehearsed = model in before
    before.add(model)
    return was_rehearsed


def choose_loss(model: nn.Module, batch: Batch) -> tuple[Loss, str | None]:
    """Returns the loss to train with, and the reason if it is the model's own; None if it is the one without logits."""
    reason = _needs_logits_reason(model)
    is_fake = isinstance(batch["input_ids"], FakeTensor)
    if reason is None and not (is_fake and _was_rehearsed(model, _rehearsed_losses)):
        reason = _probe(model, batch)
    return (logit_free_loss, None) if reason is None else (model_loss, reason)
