"""Tests of the check that a model has a position for each token of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora_lite.errors import ConfigError
from qlora_lite.training.objective.positions import check_length, check_positions


def row(tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 3 + tokens).view(1, tokens)
    return {"input_ids": ids, "labels": ids}


def test_rows_are_as_long_as_the_table_at_most(small_model: Callable[..., Any]) -> None:
    model = small_model("GPT2Config", n_positions=20)
    check_positions(model, row(20))
    says = "examples of 21 tokens do not fit into a GPT2LMHeadModel, which has 20 positions; cut them to at most 20"
    with pytest.raises(ConfigError, match=says):
        check_positions(model, row(21))


def test_models_without_a_table_take_longer_rows(small_model: Callable[..., Any]) -> None:
    check_positions(small_model("LlamaConfig", max_position_embeddings=20), row(30))
    check_length(torch.nn.Linear(2, 2), 1 << 20)


def test_of_packed_rows_the_positions_count(small_model: Callable[..., Any]) -> None:
    model = small_model("GPT2Config", n_positions=20)
    packed = {**row(30), "position_ids": torch.cat([torch.arange(20), torch.arange(10)])[None]}
    check_positions(model, packed)
    assert model(**packed, use_cache=False).logits.isfinite().all()
    with pytest.raises(ConfigError, match="examples of 21 tokens do not fit into a GPT2LMHeadModel"):
        check_positions(model, {**row(30), "position_ids": torch.arange(21)[None]})
