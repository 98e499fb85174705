"""Tests of fused models with a number of bytes, in a loop that is not `train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.training.forward.fuse import fuse_, unfuse_
from qlora_lite.training.forward.log_probs import token_log_probs


@pytest.mark.parametrize("log_probs", [False, True])
def test_a_budget_is_met_and_used_in_another_loop(
    log_probs: bool, make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = load_quantized(make_tiny_model(tmp_path, layers=4), QuantConfig())
    add_lora_(model, LoraConfig(rank=2, dropout=0.3))
    tokens = torch.randint(100, (4, 48), generator=torch.Generator().manual_seed(0))
    own = sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = 8 * sum(parameter.numel() for parameter in trained)

    def loss_of(model: Any) -> Tensor:
        if log_probs:
            return -token_log_probs(model, tokens, tokens).mean()
        return model(input_ids=tokens, labels=tokens).loss  # type: ignore[no-any-return]

    def peak_and_loss(kind: str | int) -> tuple[int, float]:
        fuse_(model, kind)
        if not isinstance(kind, str):  # the first batch measures and decides
            loss_of(model)
        torch.manual_seed(0)
        model.zero_grad()
        with StorageTrace() as trace:
            for tensor in (*model.parameters(), *model.buffers()):
                trace.label(tensor, Category.BASE_WEIGHT)
            loss = loss_of(model)
            loss.backward()
        unfuse_(model)
        return trace.peak()[0] - own + states, loss.item()

    (least, expected), (most, _) = peak_and_loss("full"), peak_and_loss("none")
    budget = least + 2 * (most - least) // 3
    used, loss = peak_and_loss(budget)
    assert least + (most - least) // 4 < used <= budget
    assert loss == pytest.approx(expected)
    fusion = fuse_(model, budget)
    for switch, expects in (
        (model.gradient_checkpointing_disable, "none"),
        (model.gradient_checkpointing_enable, budget),
    ):
        with pytest.warns(FutureWarning, match="deprecated"):
            switch()
        assert fusion.dial.checkpointing == expects
    fusion.dial.set(least // 2)
    with pytest.raises(ConfigError, match="cannot be met: recomputing every block needs"):
        model(input_ids=tokens, labels=tokens)
    assert all(parameter.grad is not None for parameter in trained)
