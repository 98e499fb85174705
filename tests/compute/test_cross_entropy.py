"""Tests of linear_cross_entropy against F.cross_entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qlora_lite.compute import cross_entropy as loss_module
from qlora_lite.compute.cross_entropy import linear_cross_entropy
from qlora_lite.compute.products import frozen_weight
from qlora_lite.errors import InputError
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.packed_weight import PackedWeight


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_cross_entropy(chunk_bytes: int, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8), torch.randn(11)
    labels = torch.randint(11, (2, 5))
    labels[0, :2] = -100
    ours = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)
    plain = F.cross_entropy(F.linear(hidden, weight, bias).view(-1, 11), labels.view(-1), reduction=reduction)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(3 * value, hidden)[0] for value in (ours, plain)))


@pytest.mark.parametrize("packed_head", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_trained_and_adapted_heads_with_every_option(
    packed_head: bool, softcap: float | None, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 40 * 3)
    monkeypatch.setattr(frozen_weight, "SLICE_BYTES", 4 * 64 * 7)  # slices of a packed head still begin at whole blocks
    torch.manual_seed(0)
    head: Any = torch.randn(40, 64, requires_grad=not packed_head)
    dense = head
    if packed_head:
        head = PackedWeight.of(head, QuantConfig(format="nf4"))
        dense = head.dequantize(torch.float32)
    hidden, bias = torch.randn(10, 64, requires_grad=True), torch.randn(40, requires_grad=True)
    a, b = torch.randn(2, 64, requires_grad=True), torch.randn(40, 2, requires_grad=True)
    labels = torch.randint(40, (10,))
    labels[3] = -100
    ours = linear_cross_entropy(
        hidden, head, labels, bias, lora=(a, b, 1.5), label_smoothing=smoothing, softcap=softcap, logit_scale=0.5
    )
    logits = 0.5 * F.linear(hidden, dense + 1.5 * b @ a, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(ours, plain)
    leaves = [hidden, bias, a, b] + ([] if packed_head else [head])
    for mine, theirs in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_memory_is_bounded_whatever_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(frozen_weight, "SLICE_BYTES", 1 << 18)
    labels = torch.arange(64)
    for vocabulary in (1000, 8000):
        head = PackedWeight.of(torch.randn(vocabulary, 64), QuantConfig(format="int8"))
        hidden = torch.randn(64, 64, requires_grad=True)
        with StorageTrace() as trace:
            for _ in range(2):  # the first call makes tables that stay
                linear_cross_entropy(hidden, head, labels).backward()
        assert trace.peak()[0] < head.storage_bytes() + 2 * hidden.nbytes + 5 * (1 << 18)


def test_packed_head_is_its_dequantized_self() -> None:
    torch.manual_seed(0)
    packed = PackedWeight.of(torch.randn(32, 16), QuantConfig(format="int8"))
    hidden, labels = torch.randn(6, 16), torch.randint(32, (6,))
    assert torch.equal(
        linear_cross_entropy(hidden, packed, labels),
        linear_cross_entropy(hidden, packed.dequantize(torch.float32), labels),
    )


def test_bf16_is_no_worse_than_the_naive_loss() -> None:
    torch.manual_seed(0)
    exact, weight = torch.randn(256, 64), torch.randn(500, 64) / 8
    labels = torch.randint(500, (256,))
    half, half_weight = exact.bfloat16(), weight.bfloat16()
    reference = F.cross_entropy(half.float() @ half_weight.float().T, labels)
    naive = F.cross_entropy(half @ half_weight.T, labels).float()
    ours = linear_cross_entropy(half, half_weight, labels)
    assert (ours - reference).abs() <= (naive - reference).abs() + 1e-6


def test_no_label_is_nan_as_in_torch_and_wrong_shapes_are_refused() -> None:
    assert linear_cross_entropy(torch.randn(2, 4), torch.randn(3, 4), torch.full((2,), -100)).isnan()
    with pytest.raises(InputError, match=r"shape \(2,\); got \(3,\)"):
        linear_cross_entropy(torch.randn(2, 4), torch.randn(3, 4), torch.zeros(3, dtype=torch.long))


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained head in an evaluation: the sums of its gradient would be as large as the head in fp32."""
    hidden, weight, labels = torch.randn(6, 8), torch.randn(11, 8, requires_grad=True), torch.arange(6)
    expected = linear_cross_entropy(hidden, weight, labels)
    monkeypatch.setattr(loss_module, "chunk_gradients", lambda *given: pytest.fail("gradients were computed"))
    with torch.no_grad():
        found = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(found, expected) and expected.requires_grad and not found.requires_grad
