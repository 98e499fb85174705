"""Tests of log-probabilities against the softmax of the model's own logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from qlora_lite import LoraConfig, QuantConfig, add_lora_, quantize_base_
from qlora_lite.errors import ConfigError, InputError
from qlora_lite.integrations.peft import lora_config
from qlora_lite.training.forward.fuse import fuse_
from qlora_lite.training.forward.log_probs import token_log_probs, token_statistics

TOKENS = torch.arange(16, 56).view(2, 20)
LABELS = TOKENS.clone()
LABELS[:, :5] = -100
MASK = torch.ones_like(TOKENS)
MASK[1, -4:] = 0
LABELS[1, -4:] = -100


def expected(model: Any, temperature: float = 1.0) -> Tensor:
    """The log-probabilities from the logits."""
    log_p = (model(TOKENS, attention_mask=MASK).logits[:, :-1].float() / temperature).log_softmax(-1)
    labels = LABELS[:, 1:]
    return log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (labels != -100)


def with_random_adapters(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["LlamaConfig", "Gemma2Config"])  # the second caps its logits
@pytest.mark.parametrize("fused", [False, True])
def test_values_and_gradients_are_those_of_the_logits(
    family: str, fused: bool, small_model: Callable[..., Any]
) -> None:
    model = small_model(family)
    quantize_base_(model, QuantConfig())
    add_lora_(model, LoraConfig(rank=2))
    with_random_adapters(model)
    plain = copy.deepcopy(model)
    if fused:
        fuse_(model)
    factors = torch.randn(2, 19)
    found = token_log_probs(model, TOKENS, LABELS, attention_mask=MASK)
    assert found.dtype == torch.float32 and found.shape == (2, 19)
    torch.testing.assert_close(found, expected(plain), rtol=1e-4, atol=1e-5)
    for own, whole in ((model, found), (plain, expected(plain))):
        (factors * whole).sum().backward()
        assert all(parameter.grad is not None for parameter in own.parameters() if parameter.requires_grad)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_logits_are_not_made(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig")
    model.lm_head.register_forward_hook(lambda *given: shapes.append(given[2].shape))
    shapes: list[torch.Size] = []
    token_log_probs(model, TOKENS, LABELS)  # tries the model
    shapes.clear()
    token_log_probs(model, TOKENS, LABELS)
    assert not shapes


@pytest.mark.parametrize("fused", [False, True])
def test_an_adapter_of_peft_on_the_head_counts(fused: bool, small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig")
    quantize_base_(model, QuantConfig())
    if fused:
        fusion = fuse_(model)
        token_log_probs(model, TOKENS, LABELS, attention_mask=MASK)
        assert fusion.loss == "logit-free"
    adapted = peft.get_peft_model(model, lora_config(model, r=2, target_modules=["q_proj", "lm_head"]))
    with_random_adapters(adapted)
    found = token_log_probs(adapted, TOKENS, LABELS, attention_mask=MASK)
    torch.testing.assert_close(found, expected(adapted), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert adapted.base_model.model.lm_head.lora_B["default"].weight.grad.any()
    loss = adapted(input_ids=TOKENS, labels=LABELS, attention_mask=MASK).loss
    torch.testing.assert_close(loss, -found.sum() / int((LABELS[:, 1:] != -100).sum()), rtol=1e-4, atol=1e-5)


def test_figures_at_a_temperature_and_with_shifted_labels(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig")
    found = token_statistics(
        model, TOKENS, LABELS, attention_mask=MASK, temperature=0.5, statistics=["entropy", "is_top1"]
    )
    torch.testing.assert_close(found.log_probs, expected(model, 0.5), rtol=1e-4, atol=1e-5)
    assert found.entropy is not None and found.is_top1 is not None and found.mean_logits is None
    shifted = torch.nn.functional.pad(LABELS[:, 1:], (0, 1), value=-100)
    again = token_statistics(model, TOKENS, shifted, attention_mask=MASK, temperature=0.5, labels_are_shifted=True)
    assert again.log_probs.shape == (2, 20)
    torch.testing.assert_close(again.log_probs[:, :-1], found.log_probs)


def test_wrong_models_and_labels_are_refused(small_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"labels should have the shape \(2, 20\); got \(2, 19\)"):
        token_log_probs(small_model("LlamaConfig"), TOKENS, LABELS[:, 1:])
    classifier = transformers.LlamaForSequenceClassification(small_model("LlamaConfig").config)
    with pytest.raises(ConfigError, match="need a causal language model; got a LlamaForSequenceClassification"):
        token_log_probs(classifier, TOKENS, LABELS)
