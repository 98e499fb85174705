"""Tests of the check that every trained parameter gets a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora_lite import LoraConfig, TrainConfig, add_lora_, train
from qlora_lite.errors import TrainingError
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.training.objective.gradients import check_gradients, check_reach
from qlora_lite.training.objective.losses import logit_free_loss

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}
DECODER = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}


def adapted(small_model: Callable[..., Any], family: str, lora: dict[str, Any] | None = None, **sizes: Any) -> Any:
    model = small_model(family, **sizes).requires_grad_(False)
    add_lora_(model, LoraConfig(rank=2, **(lora or {})))
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
    return model


def reach(model: Any, batch: dict[str, torch.Tensor] | None = None) -> None:
    check_reach(model, adapter_parameters(model), logit_free_loss, BATCH if batch is None else batch)


def test_layers_that_text_does_not_reach_are_told_before_the_first_step(small_model: Callable[..., Any]) -> None:
    model = adapted(small_model, "BartConfig", **DECODER)
    steps: list[int] = []
    model.model.decoder.embed_tokens.register_forward_hook(lambda module, args, out: steps.append(out.shape[1]))
    with pytest.raises(TrainingError) as refused:
        train(model, [BATCH], TrainConfig(steps=1), progress=False)
    assert str(refused.value) == (
        "8 of 20 adapted layers get no gradient from text: encoder_attn (8 layers); the model does not use them here, "
        "so leave them out with exclude_modules=['encoder_attn'] (--exclude-modules encoder_attn)"
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    model = adapted(small_model, "BartConfig", {"exclude_modules": ["encoder_attn"]}, **DECODER)
    assert train(model, [BATCH], TrainConfig(steps=1), progress=False).steps[0].gradient_norm > 0


def test_a_vision_tower_is_named_by_one_word(small_model: Callable[..., Any]) -> None:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "image_size"), 32)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    parts = {
        "text_config": {**sizes, **heads, "vocab_size": 64, "pad_token_id": 0},
        "vision_config": {**sizes, **heads, "patch_size": 8},
        "mm_tokens_per_image": 4,
    }
    everything = {"target_modules": "all-linear-with-towers"}
    model = adapted(small_model, "Gemma3Config", everything, **parts, image_token_index=60)
    with pytest.raises(
        TrainingError, match=r"get no gradient from text: vision_tower \(14 layers\);.*=\['vision_tower'\]"
    ):
        reach(model)
    # With pictures, the tower may run, which the first step shows.
    reach(model, {**BATCH, "pixel_values": torch.zeros(2, 3, 32, 32)})
    reach(adapted(small_model, "Gemma3Config", **parts, image_token_index=60))  # all-linear leaves it out


def test_layers_that_only_longer_rows_reach_are_kept(small_model: Callable[..., Any]) -> None:
    """As those that compress a window of tokens: the first row of the batch decides where made-up tokens do not."""
    model = adapted(small_model, "LlamaConfig", {"target_modules": ["q_proj", "up_proj"]})
    for layer in model.model.layers:
        whole = layer.mlp.forward
        layer.mlp.forward = lambda x, whole=whole: whole(x) if x.shape[1] >= 20 else 0 * x
    ids = torch.randint(3, 60, (2, 20))
    reach(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)})
    with pytest.raises(TrainingError, match=r"2 of 4 adapted layers get no gradient from text: mlp \(2 layers\)"):
        reach(model)


def test_a_lack_of_memory_is_left_to_the_step(small_model: Callable[..., Any]) -> None:
    def full(module: Any, args: Any, out: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model = adapted(small_model, "LlamaConfig")
    handle = model.model.embed_tokens.register_forward_hook(full)
    reach(model)
    handle.remove()
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out.no_such_attribute)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        reach(model)


def test_layers_that_some_blocks_reach_are_left_to_the_first_step(small_model: Callable[..., Any]) -> None:
    """As the experts of a mixture, of which few tokens do not reach each."""
    model = adapted(small_model, "LlamaConfig", {"target_modules": ["q_proj", "up_proj"]})
    up = model.model.layers[1].mlp.up_proj
    up.forward = torch.no_grad()(up.forward)
    reach(model)
    logit_free_loss(model, BATCH).backward()
    with pytest.raises(TrainingError) as refused:
        check_gradients(model, adapter_parameters(model))
    assert "1 of 4 adapted layers get no gradient in the first step: 1.mlp (1 layers)" in str(refused.value)


def test_other_parameters_are_named(small_model: Callable[..., Any]) -> None:
    model = adapted(small_model, "LlamaConfig", {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]})
    model.model.norm.forward = torch.no_grad()(model.model.norm.forward)
    with pytest.raises(RuntimeError):  # nothing of the loss has a gradient then
        reach(model)
    model = adapted(small_model, "LlamaConfig", {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]})
    plain = torch.nn.RMSNorm(32).requires_grad_(False)
    model.model.norm.forward = lambda x: plain(x)
    with pytest.raises(
        TrainingError, match=r"1 of 5 trained parameters get no gradient from text: model\.norm\..*; leave"
    ):
        reach(model)


def test_the_check_leaves_modes_random_states_and_gradients_as_they_were(small_model: Callable[..., Any]) -> None:
    model = adapted(small_model, "LlamaConfig", {"dropout": 0.5}).train()
    model.model.layers[0].eval()
    before, state = [module.training for module in model.modules()], torch.get_rng_state()
    reach(model)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
