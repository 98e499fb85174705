"""Tests of activation checkpointing: equal gradients, and forward methods that are restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from qlora_lite import LoraConfig, MemoryProfiler, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.compute import lora_linear
from qlora_lite.errors import ConfigError
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.surgery import repeated_blocks
from qlora_lite.training.forward.activation_checkpointing import checkpointed
from qlora_lite.training.objective.losses import logit_free_loss


def test_gradients_are_the_same_and_less_is_kept(tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig(), dtype=torch.float32)
    add_lora_(model, LoraConfig(rank=2, dropout=0.3))
    tokens = torch.randint(100, (2, 16))
    seen = []
    for kind in ("none", "full"):
        torch.manual_seed(0)
        model.train().zero_grad()
        kept: list[int] = []
        with (
            checkpointed(model, kind),
            torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t),  # noqa: B023
        ):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        seen.append((sum(kept), [parameter.grad.clone() for parameter in adapter_parameters(model).values()]))
    assert seen[1][0] < 0.5 * seen[0][0]
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(seen[0][1], seen[1][1], strict=True))
    assert len(repeated_blocks(model)) == 2 and not any("forward" in vars(block) for block in repeated_blocks(model))


def test_the_last_product_of_a_block_is_not_computed_again(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_quantized(tiny_folder, QuantConfig()).train()
    add_lora_(model, LoraConfig(rank=2))
    tokens = torch.randint(100, (1, 8))
    products: list[int] = []
    product = lora_linear.base_product
    monkeypatch.setattr(lora_linear, "base_product", lambda *given: (products.append(1), product(*given))[1])
    with checkpointed(model, "full"):
        loss = logit_free_loss(model, {"input_ids": tokens, "labels": tokens})
        assert len(products) == 2 * 7
        loss.backward()
    assert len(products) == 2 * (7 + 6)


def test_a_budget_is_met_and_used(make_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = load_quantized(make_tiny_model(tmp_path, layers=6), QuantConfig())
    add_lora_(model, LoraConfig(rank=2))
    tokens = torch.randint(100, (4, 64))
    data = {"input_ids": tokens, "labels": tokens}
    own = sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())

    def peak(kind: str | int) -> int:
        with MemoryProfiler() as profiler:
            train(model, [data], TrainConfig(steps=3, checkpointing=kind), profiler=profiler, progress=False)
        return max(phase.live_peak or 0 for phase in profiler.report().phases) - own

    least, most = peak("full"), peak("none")
    for budget in (least + (most - least) // 3, least + 2 * (most - least) // 3, 2 * most):
        used = peak(budget)
        assert used <= budget
        assert used >= min(0.99 * most, budget - 0.35 * (most - least))
    with pytest.raises(ConfigError, match="cannot be met: recomputing every block needs"):
        peak(least // 2)


XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "n_words": 64, "causal": True, "dropout": 0, "attention_dropout": 0}
REFORMER = {
    "is_decoder": True,
    "axial_pos_embds": False,
    "feed_forward_size": 48,
    "attention_head_size": 16,
    "attn_layers": ["local", "local"],
    "local_attn_chunk_length": 4,
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 32,
}


def first_gradients(model: Any, data: dict[str, torch.Tensor], kind: str | int) -> dict[str, torch.Tensor]:
    """The gradients that training gives to its optimizer in the first step. The adapters stay as they are."""
    found: dict[str, torch.Tensor] = {}
    names = {parameter: name for name, parameter in adapter_parameters(model).items()}

    def keep(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            found.update({names[parameter]: parameter.grad.clone() for parameter in group["params"]})

    handle = register_optimizer_step_pre_hook(keep)
    try:
        config = TrainConfig(steps=1, checkpointing=kind, learning_rate=1e-30, max_grad_norm=None)
        train(model, [data], config, progress=False)
    finally:
        handle.remove()
    return found


def adapted(small_model: Callable[..., Any], family: str, sizes: dict[str, Any]) -> Any:
    model = small_model(family, **sizes).requires_grad_(False)
    add_lora_(model, LoraConfig(rank=2))
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)
    return model


def test_blocks_that_fill_a_cache_are_recomputed_without_it(small_model: Callable[..., Any]) -> None:
    model = adapted(small_model, "XLMConfig", XLM)
    ids = torch.randint(3, 60, (2, 12))
    data = {"input_ids": ids, "labels": ids}
    kept, recomputed = (first_gradients(model, data, kind) for kind in ("none", "full"))
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["none", "full"])
def test_reversible_layers_recompute_themselves(small_model: Callable[..., Any], kind: str) -> None:
    model = adapted(small_model, "ReformerConfig", REFORMER)
    ids = torch.randint(3, 60, (2, 12))
    data = {"input_ids": ids, "labels": ids}
    gradients = first_gradients(model, data, kind)
    parameters = adapter_parameters(model)
    assert gradients.keys() == parameters.keys()
    # Their backward cannot be compared with another one, so the slope of the loss is: along each B, which is smooth.
    for name, parameter in parameters.items():
        if name.endswith("lora_B"):
            direction, losses = torch.sign(gradients[name]), []
            for size in (1e-3, -2e-3):
                parameter.data.add_(direction, alpha=size)
                losses.append(float(logit_free_loss(model, data).detach()) / 22)
            parameter.data.add_(direction, alpha=1e-3)
            slope = (losses[0] - losses[1]) / 2e-3
            assert slope == pytest.approx(float(gradients[name].abs().sum()), rel=0.2, abs=2e-3), name


def test_reversible_layers_take_no_budget(small_model: Callable[..., Any]) -> None:
    with (
        pytest.raises(ConfigError, match="a ReformerModelWithLMHead recomputes all of its layers; set"),
        checkpointed(small_model("ReformerConfig", **REFORMER), 1 << 20),
    ):
        pass


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="has none"), checkpointed(nn.Sequential(nn.Linear(2, 2)), "full"):
        pass
