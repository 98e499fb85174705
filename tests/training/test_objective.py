"""Tests of the choice of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.data.batching import labelled_tokens
from qlora_lite.training.objective import choose_loss, logit_free_loss, model_loss


@pytest.mark.parametrize("embedding_format", ["none", "int8"])
def test_both_losses_are_one(tiny_folder: Path, embedding_format: str) -> None:
    model = load_quantized(tiny_folder, QuantConfig(embedding_format=embedding_format), dtype=torch.float32)
    tokens = torch.randint(100, (2, 9))
    labels = tokens.clone()
    labels[0, :4] = -100
    batch = {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}
    assert labelled_tokens(batch) == 13
    torch.testing.assert_close(logit_free_loss(model, batch), model_loss(model, batch), rtol=1e-5, atol=1e-5)
    assert choose_loss(model, batch) == (logit_free_loss, None)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 16}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 4.0}),
    ],
)
def test_models_that_change_their_logits(family: str, options: dict[str, Any]) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        **options,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).requires_grad_(False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    tokens = torch.randint(64, (1, 5))
    batch = {"input_ids": tokens, "labels": tokens}
    assert choose_loss(model, batch) == (logit_free_loss, None)
    torch.testing.assert_close(logit_free_loss(model, batch), model_loss(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapted_head_needs_no_logits_either(tiny_folder: Path, merged: bool) -> None:
    model = load_quantized(tiny_folder, QuantConfig(format="int8"), dtype=torch.float32)
    add_lora_(model, LoraConfig(target_modules=["lm_head"]))
    torch.nn.init.normal_(model.lm_head.lora_B)
    if merged:
        model.lm_head.merge_weights()
    tokens = torch.randint(100, (1, 5))
    batch = {"input_ids": tokens, "labels": tokens}
    assert choose_loss(model, batch) == (logit_free_loss, None)
    torch.testing.assert_close(logit_free_loss(model, batch), model_loss(model, batch), rtol=1e-5, atol=1e-5)


def test_the_reason_for_the_own_loss_of_the_model_is_given(tiny_folder: Path) -> None:
    class Louder(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    tokens = torch.randint(100, (1, 5))
    batch = {"input_ids": tokens, "labels": tokens}
    model = load_quantized(tiny_folder, QuantConfig())
    hook = model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    assert "on a probe its own loss is" in str(choose_loss(model, batch)[1])
    hook.remove()
    model.lm_head = Louder(64, model.config.vocab_size)
    assert choose_loss(model, batch) == (model_loss, "its output head is a Louder")
    model = load_quantized(tiny_folder, QuantConfig())
    add_lora_(model, LoraConfig(target_modules=["lm_head"], dropout=0.1))
    assert choose_loss(model, batch) == (model_loss, "the adapter of its output head has dropout")
