"""Tests of NEFTune: the noise has the size of the formula, is in training mode only, and changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite import LoraConfig, TrainConfig, add_lora_, train
from qlora_lite.errors import ConfigError
from qlora_lite.training.forward.embedding_noise import noisy_embeddings

Make = Callable[..., Any]


def test_noise_is_uniform_of_the_size_of_the_formula_and_that_of_transformers(small_model: Make) -> None:
    from transformers.integrations.neftune import neftune_post_forward_hook

    model, alpha = small_model("LlamaConfig").train(), 5.0
    tokens = torch.randint(64, (4, 50))
    clean = model.model.embed_tokens(tokens).detach()
    torch.manual_seed(3)
    with noisy_embeddings(model, alpha), torch.no_grad():
        noise = model.model.embed_tokens(tokens) - clean
    largest = alpha / (50 * 32) ** 0.5
    assert noise.max() == pytest.approx(largest, rel=0.01) and noise.min() == pytest.approx(-largest, rel=0.01)
    assert abs(noise.mean()) < 0.02 * largest and noise.std() == pytest.approx(largest / 3**0.5, rel=0.02)
    model.model.embed_tokens.neftune_noise_alpha = alpha
    torch.manual_seed(3)
    torch.testing.assert_close(neftune_post_forward_hook(model.model.embed_tokens, None, clean) - clean, noise)


def test_noise_is_in_training_mode_within_the_block_only(small_model: Make) -> None:
    model, tokens = small_model("LlamaConfig"), torch.arange(6).view(1, 6)
    clean = model(tokens).logits
    with noisy_embeddings(model, 5.0):
        assert torch.equal(model(tokens).logits, clean)
        assert not torch.equal(model.train()(tokens).logits, clean)
    with noisy_embeddings(model, None):
        assert torch.equal(model(tokens).logits, clean)
    assert not model.model.embed_tokens._forward_hooks
    with (
        pytest.raises(ConfigError, match="a Linear names no input embedding; leave out neftune_noise_alpha"),
        noisy_embeddings(nn.Linear(2, 2), 1.0),
    ):
        pass


def test_training_gets_the_noise_and_leaves_none_behind(small_model: Make) -> None:
    def losses(**settings: Any) -> list[float]:
        model = small_model("LlamaConfig")
        add_lora_(model, LoraConfig(rank=2))
        ids = torch.arange(2, 12).view(1, 10)
        found = train(model, [{"input_ids": ids, "labels": ids}], TrainConfig(steps=1, **settings), progress=False)
        assert not model.model.embed_tokens._forward_hooks
        return found.losses

    clean, noisy = losses(), losses(neftune_noise_alpha=5.0)
    assert noisy != clean and noisy == pytest.approx(clean, rel=0.2)
    assert losses(neftune_noise_alpha=5.0, checkpointing="none") == pytest.approx(noisy, rel=1e-5)
