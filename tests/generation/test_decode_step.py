"""Tests of shorter norms and attention: the same numbers up to rounding, in small steps only, and restored."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.compute.lora_linear import FEW_ROWS
from qlora_lite.generation import decode_step
from qlora_lite.generation.decode_step import short_steps
from qlora_lite.memory.trace import StorageTrace


@pytest.fixture
def model(tiny_folder: Path) -> Any:
    return load_quantized(tiny_folder, QuantConfig(format="none"), dtype=torch.bfloat16).eval()


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


@torch.no_grad()
def step(model: Any, rows: int = 3, prompt_mask: Tensor | None = None) -> Tensor:
    """The logits of a step of one token after a prompt of seven."""
    tokens = torch.randint(5, 60, (rows, 8), generator=torch.Generator().manual_seed(0))
    seen = model(tokens[:, :-1], attention_mask=prompt_mask, use_cache=True)
    mask = None if prompt_mask is None else torch.cat((prompt_mask, prompt_mask[:, -1:]), dim=1)
    given = {"past_key_values": seen.past_key_values, "attention_mask": mask}
    logits: Tensor = model(tokens[:, -1:], **given).logits
    return logits.float()


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[object]:
    """A list that grows with each call of this function of the module."""
    calls: list[object] = []
    function = getattr(decode_step, name)

    def called(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(decode_step, name, called)
    return calls


@pytest.mark.parametrize("padded", [False, True])
def test_a_step_gives_the_same_up_to_rounding(model: Any, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :2] = 0
    before = step(model, prompt_mask=mask if padded else None)
    shorter, shared = counted(monkeypatch, "short_norm"), counted(monkeypatch, "one_query_attention")
    with short_steps(model):
        after = step(model, prompt_mask=mask if padded else None)
    assert len(shorter) >= len(norms(model)) == 5
    assert len(shared) == (0 if padded else 2)  # a mask is left to transformers
    torch.testing.assert_close(after, before, atol=0.02, rtol=0.02)
    assert torch.equal(step(model, prompt_mask=mask if padded else None), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_prompts_and_training_compute_as_before(model: Any) -> None:
    norm = norms(model)[0]
    x = torch.randn(FEW_ROWS + 1, 64).bfloat16()
    with torch.no_grad():
        prompt = norm(x)
    trained = norm(x[:2])
    with short_steps(model):
        with torch.no_grad():
            assert torch.equal(norm(x), prompt)
        again = norm(x[:2])
    assert torch.equal(again, trained) and again.requires_grad == trained.requires_grad


@torch.no_grad()
def test_a_frozen_head_is_not_copied_for_each_sequence(model: Any) -> None:
    model.requires_grad_(False)
    hidden = torch.randn(4, 7, 64).bfloat16()[:, -1:]
    expected = model.lm_head(hidden.contiguous())
    called: list[list[str]] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called[-1].append(str(func))
            return func(*args, **(kwargs or {}))

    for block in (contextlib.nullcontext(), short_steps(model)):
        called.append([])
        with block, Noting():
            logits = model.lm_head(hidden)
        assert torch.equal(logits, expected)
    # torch's batched product copies the weight for each sequence, inside the operator
    assert "aten.bmm.default" in called[0] and not {"aten.bmm.default", "aten.expand.default"} & {*called[1]}
    assert "aten.mm.default" in called[1]


@torch.no_grad()
def test_a_gated_activation_takes_one_tensor_less(model: Any) -> None:
    mlp, x = model.model.layers[0].mlp, torch.randn(50, 64).bfloat16()
    counts, expected = [], mlp(x)
    for block in (contextlib.nullcontext(), short_steps(model)):
        with block, StorageTrace() as trace:
            assert torch.equal(mlp(x), expected)
        counts.append(sum(event.delta > 0 for event in trace.timeline()))
    assert counts[1] == counts[0] - 1


def test_a_norm_of_another_kind_keeps_its_forward() -> None:
    class Doubled(nn.Module):
        variance_epsilon = 1e-6

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x * self.weight

    model = nn.Sequential(Doubled())
    with short_steps(model):
        assert "forward" not in vars(model[0])
