"""Tests of norms and gated activations against plain torch and the modules of transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_lite.compute import norms_and_gates
from qlora_lite.compute.norms_and_gates import ACTIVATIONS, gated, rms_norm
from qlora_lite.compute.recompute import recomputation_of


@pytest.fixture(params=[1, 1 << 20], ids=["a row at a time", "all at once"], autouse=True)
def _slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms_and_gates, "SLICE_BYTES", request.param)


def saved(make: Callable[[], Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        make()
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_transformers_to_the_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 16).to(dtype).requires_grad_()
    norm = LlamaRMSNorm(16).to(dtype)
    torch.nn.init.normal_(norm.weight)
    ours, theirs = rms_norm(x, norm.weight, norm.variance_epsilon), norm(x)
    assert torch.equal(ours, theirs)
    grad = torch.randn_like(ours)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    found, wanted = (torch.autograd.grad(y, (x, norm.weight), grad) for y in (ours, theirs))
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)


def test_gradcheck() -> None:
    x, weight = torch.randn(3, 5, dtype=torch.double), torch.randn(5, dtype=torch.double)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight.requires_grad_()))
    for name in ACTIVATIONS:
        assert torch.autograd.gradcheck(
            lambda a, b, name=name: gated(a, b, name), (x, x.detach().cos().requires_grad_())
        )


def test_a_frozen_norm_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(5)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_gated_product_is_the_plain_one(name: str) -> None:
    gate, up = (torch.randn(3, 7, 16).bfloat16().requires_grad_() for _ in range(2))
    ours, theirs = gated(gate, up, name), ACTIVATIONS[name].function(gate) * up
    assert torch.equal(ours, theirs)
    grad = torch.randn_like(ours)
    found, wanted = (torch.autograd.grad(y, (gate, up), grad) for y in (ours, theirs))
    assert all(torch.equal(mine, right) for mine, right in zip(found, wanted, strict=True))


def test_only_the_inputs_are_kept_in_their_own_dtype() -> None:
    x, up = (torch.randn(4, 16).bfloat16().requires_grad_() for _ in range(2))
    weight = torch.randn(16).bfloat16()
    kept = saved(lambda: rms_norm(x, weight, 1e-5)) + saved(lambda: gated(x, up))
    assert {(tuple(t.shape), t.dtype) for t in kept} == {((4, 16), torch.bfloat16), ((16,), torch.bfloat16)}
    assert len(kept) == 4


def test_outputs_can_be_recomputed_bit_for_bit() -> None:
    x, up = (torch.randn(4, 16).bfloat16().requires_grad_() for _ in range(2))
    for y in (rms_norm(x, torch.randn(16).bfloat16(), 1e-5), gated(x, up)):
        found = recomputation_of(y)
        assert found is not None
        found.result.expect_reader()
        assert torch.equal(found.result.read(found.inputs), y)
    with torch.no_grad():
        assert recomputation_of(gated(x, up)) is None
