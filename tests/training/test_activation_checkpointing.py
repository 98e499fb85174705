"""Tests of activation checkpointing: equal gradients, and forward methods that are restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_lite import LoraConfig, MemoryProfiler, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.compute import lora_linear
from qlora_lite.errors import ConfigError
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.surgery import repeated_blocks
from qlora_lite.training.activation_checkpointing import checkpointed
from qlora_lite.training.objective import logit_free_loss


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
    product = lora_linear._product
    monkeypatch.setattr(lora_linear, "_product", lambda *given: (products.append(1), product(*given))[1])
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


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="has none"), checkpointed(nn.Sequential(nn.Linear(2, 2)), "full"):
        pass
