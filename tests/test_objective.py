"""The choice of the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.objective import choose_loss, headless_loss, labelled_tokens, own_loss


@pytest.mark.parametrize("embedding_format", ["none", "int8"])
def test_both_losses_are_one(tiny_folder: Path, embedding_format: str) -> None:
    model = load_quantized(tiny_folder, QuantConfig(embedding_format=embedding_format), dtype=torch.float32)
    tokens = torch.randint(100, (2, 9))
    labels = tokens.clone()
    labels[0, :4] = -100
    batch = {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}
    assert labelled_tokens(batch) == 13
    torch.testing.assert_close(headless_loss(model, batch), own_loss(model, batch), rtol=1e-5, atol=1e-5)
    assert choose_loss(model, batch) == (headless_loss, None)


def test_a_model_that_changes_its_logits_keeps_its_own_loss() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = Gemma2ForCausalLM(config).requires_grad_(False)
    tokens = torch.randint(64, (1, 5))
    loss, why = choose_loss(model, {"input_ids": tokens, "labels": tokens})
    assert loss is own_loss and why == "its config sets final_logit_softcapping"


def test_an_adapted_head_keeps_the_models_loss(tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig())
    add_lora_(model, LoraConfig(target_modules=["lm_head"]))
    tokens = torch.randint(100, (1, 5))
    assert choose_loss(model, {"input_ids": tokens, "labels": tokens})[1] == "its output head is a LoraLayer"
