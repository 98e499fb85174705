"""Tests of the rows of made-up tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.training.objective.made_up_rows import (
    MadeUpRows,
    changes,
    length_within,
    states_of,
    undisturbed,
    was_rehearsed,
)

BATCH = {"input_ids": torch.arange(8).view(2, 4)}


def test_tokens_come_from_the_middle_of_the_vocabulary_and_differ(small_model: Callable[..., Any]) -> None:
    made_up = MadeUpRows(small_model("LlamaConfig", vocab_size=200), BATCH)
    tokens, others = made_up.tokens(2, 30), made_up.tokens(2, 30, 1)
    assert tokens.shape == (2, 30) and len(set(tokens.flatten().tolist())) == 60
    assert int(tokens.min()) >= 50 and int(tokens.max()) < 150
    assert (tokens != others).all()
    assert MadeUpRows(torch.nn.Linear(2, 2), BATCH).tokens(1, 3).shape == (1, 3)  # its vocabulary is not known


def test_states_are_hidden_states_or_logits(small_model: Callable[..., Any]) -> None:
    assert states_of(small_model("LlamaConfig"), BATCH).shape == (2, 4, 32)
    assert states_of(small_model("Llama4TextConfig", intermediate_size_mlp=48), BATCH).shape == (2, 4, 32)

    class Other(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 9))

    assert states_of(Other(), BATCH).shape == (2, 4, 9)


def test_lengths_keep_to_the_longest_sequence(small_model: Callable[..., Any]) -> None:
    assert length_within(small_model("LlamaConfig"), (30, 60)) == [30, 60]
    assert length_within(small_model("GPT2Config", n_positions=9), (30, 60)) == [3, 6]
    assert length_within(torch.nn.Linear(2, 2), (3, 5)) == [3, 5]


def test_changes_are_parts_of_the_norm() -> None:
    expected = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    found = torch.tensor([[[3.0, 4.5], [0.0, 2.0]]])
    torch.testing.assert_close(changes(found, expected), torch.tensor([[0.1, 0.0]]))


def rounded(tokens: torch.Tensor) -> torch.Tensor:
    """Outputs of a norm of 2 that depend on all tokens of a batch, as those of a mixture of experts."""
    return torch.ones(2, tokens.shape[1], 4) + 1e-4 * torch.sin(tokens.float().sum())


def untouched(tokens: torch.Tensor) -> torch.Tensor:
    return torch.ones(2, tokens.shape[1], 4)


@pytest.mark.parametrize(
    ("size", "outputs", "dtype", "by_rounding"),
    [
        (0.0, untouched, torch.float32, True),
        (1e-6, untouched, torch.float32, True),
        (1e-4, untouched, torch.float32, False),
        (1e-4, rounded, torch.float32, True),
        (1e-2, rounded, torch.float32, False),
        (0.0, untouched, torch.bfloat16, True),
        (1e-2, untouched, torch.bfloat16, False),
    ],
)
def test_changes_by_rounding_are_told_by_those_of_another_row(
    small_model: Callable[..., Any], size: float, outputs: Any, dtype: torch.dtype, by_rounding: bool
) -> None:
    made_up = MadeUpRows(small_model("LlamaConfig"), BATCH)
    expected = torch.ones(2, 5, 4, dtype=dtype)
    found = made_up.change(expected * (1 + size), expected, 5, outputs)
    assert found is None if by_rounding else found == pytest.approx(size, rel=0.5)


def test_what_rounding_does_to_one_row_alone_is_told_too(small_model: Callable[..., Any]) -> None:
    """A token that it sent to another expert."""
    expected = torch.ones(2, 5, 4)
    in_one_row = expected.clone()
    in_one_row[1, 3] *= 1.5
    made_up = MadeUpRows(small_model("LlamaConfig"), BATCH)
    assert made_up.change(in_one_row, expected, 5, rounded) is None
    assert made_up.change(in_one_row, expected, 5, untouched) == pytest.approx(0.5)


def test_modes_and_random_states_are_afterwards_as_before(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig").train()
    model.model.layers[0].eval()
    before, states = [module.training for module in model.modules()], (torch.get_rng_state(), random.getstate())
    with pytest.raises(KeyError), undisturbed(model):
        assert not any(module.training for module in model.modules())
        torch.rand(3)
        random.random()
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_integer_products_are_off_meanwhile(tiny_folder: Path) -> None:
    """All tokens of a batch decide which columns they treat apart, which changes a result by far more than rounding."""
    model = load_quantized(tiny_folder, QuantConfig(format="int8", int8_activations=True))
    weights: list[Any] = [module for module in model.modules() if getattr(module, "int8_activations", False)]
    with undisturbed(model):
        assert weights and not any(weight.int8_activations for weight in weights)
    assert all(weight.int8_activations for weight in weights)


def test_a_rehearsed_model_is_remembered() -> None:
    before: WeakSet[torch.nn.Module] = WeakSet()
    model = torch.nn.Linear(2, 2)
    assert [was_rehearsed(model, before) for _ in range(2)] == [False, True]
    assert not was_rehearsed(torch.nn.Linear(2, 2), before)
