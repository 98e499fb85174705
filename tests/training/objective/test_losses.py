"""Tests of the three ways to compute a loss, against plain torch and the losses of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.data.batching import labelled_tokens
from qlora_lite.errors import ConfigError
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.training.objective.losses import logit_free_loss, logits_loss, model_loss

Loss = Callable[[Any, Any], torch.Tensor]


def a_batch(rows: int = 2, tokens: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 60, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("embedding_format", ["none", "int8"])
def test_all_are_the_cross_entropy_of_the_next_token(tiny_folder: Path, embedding_format: str) -> None:
    model = load_quantized(tiny_folder, QuantConfig(embedding_format=embedding_format), dtype=torch.float32)
    batch = a_batch()
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum")
    assert labelled_tokens(batch) == 13
    for loss in (logit_free_loss, logits_loss, model_loss):
        torch.testing.assert_close(loss(model, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapted_head_needs_no_logits(tiny_folder: Path, merged: bool) -> None:
    model = load_quantized(tiny_folder, QuantConfig(format="int8"), dtype=torch.float32)
    add_lora_(model, LoraConfig(target_modules=["lm_head"]))
    torch.nn.init.normal_(model.lm_head.lora_B)
    if merged:
        model.lm_head.merge_weights()
    torch.testing.assert_close(logit_free_loss(model, a_batch()), logits_loss(model, a_batch()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("output", [SimpleNamespace(), SimpleNamespace(logits=torch.zeros(2, 60))])
def test_models_without_logits_for_each_token_are_refused(output: Any) -> None:
    class Classifier(torch.nn.Module):
        config = SimpleNamespace()

        def forward(self, **inputs: Any) -> Any:
            return output

    says = r"a Classifier returns (no logits|logits of shape \(2, 60\)) for input_ids of shape \(2, 9\); train needs a"
    with pytest.raises(ConfigError, match=says):
        logits_loss(Classifier(), a_batch())


ROUTED = {
    "MixtralConfig": {},
    "Qwen2MoeConfig": {"shared_expert_intermediate_size": 16},
    "GptOssConfig": {},
    "MiniMaxM2Config": {"rotary_dim": 8},
    "JetMoeConfig": {"kv_channels": 16, "aux_loss_coef": 0.3},
}


def with_routers(small_model: Callable[..., Any], family: str, **more: Any) -> Any:
    """A model with an adapter, whose loss of the routers is as large as its cross-entropy."""
    wanted = {"output_router_logits": True, "router_aux_loss_coef": 0.3, "attn_implementation": "eager"}
    model = small_model(family, **(ROUTED[family] | wanted | more)).requires_grad_(False)
    add_lora_(model, LoraConfig(rank=2, target_modules=r".*\.(q_proj|query_proj|o_proj|kv_proj)"))
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("family", ROUTED)
def test_the_loss_of_routers_is_in_the_loss_and_in_the_gradient(small_model: Callable[..., Any], family: str) -> None:
    model, batch = with_routers(small_model, family), a_batch()
    batch["attention_mask"][1, 6:], batch["labels"][1, 6:] = 0, -100
    own = model(**batch).loss * labelled_tokens(batch)
    logits = model(**{**batch, "labels": None}).logits[:, :-1]
    without = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    assert own > without + 0.1 * labelled_tokens(batch)
    expected = gradients(model, own)
    for loss in (logit_free_loss, logits_loss):
        found = loss(model, batch)
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients(model, found).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_training_follows_the_loss_of_routers(small_model: Callable[..., Any], checkpointing: str) -> None:
    """The routers are run in blocks that are recomputed."""
    batch = {name: value for name, value in a_batch().items() if name != "attention_mask"}
    plain = with_routers(small_model, "MixtralConfig")
    own = plain(**batch).loss
    norm = torch.stack([gradient.norm() for gradient in gradients(plain, own).values()]).norm()
    model = with_routers(small_model, "MixtralConfig")
    config = TrainConfig(steps=1, checkpointing=checkpointing, max_grad_norm=None)
    step = train(model, [batch], config, progress=False).steps[0]
    assert step.loss == pytest.approx(float(own.detach()), rel=1e-5)
    assert step.gradient_norm == pytest.approx(float(norm), rel=1e-4)


def test_a_loss_of_routers_that_the_model_does_not_compute_is_an_error(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig", output_router_logits=True)
    model.forward = lambda **inputs: SimpleNamespace(loss=None)
    with pytest.raises(ConfigError, match=r"asks for a loss of its routers \(output_router_logits\), which the model"):
        logit_free_loss(model, a_batch())
