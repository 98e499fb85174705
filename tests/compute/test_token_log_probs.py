"""Tests of linear_log_probs against torch's log_softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lite.compute import cross_entropy as chunks
from qlora_lite.compute.products import frozen_weight
from qlora_lite.compute.token_log_probs import STATISTICS, TokenStatistics, linear_log_probs
from qlora_lite.errors import InputError
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.packed_weight import PackedWeight


def plain_figures(logits: Tensor, labels: Tensor) -> TokenStatistics:
    """The figures from the logits of all tokens."""
    log_p = F.log_softmax(logits, -1)
    has_label = labels != -100
    of_label = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    figures = of_label, -(log_p.exp() * log_p).sum(-1), (2 * log_p).exp().sum(-1).log(), logits.mean(-1)
    return TokenStatistics(*(figure * has_label for figure in figures), (logits.argmax(-1) == labels) & has_label)


@pytest.mark.parametrize("head", ["frozen", "packed", "trained", "adapted"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_figures_and_gradients_are_those_of_the_logits(
    head: str, softcap: float | None, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(chunks, "SOFTMAX_BYTES", 3 * 40 * 4)
    monkeypatch.setattr(frozen_weight, "SLICE_BYTES", 4 * 64 * 7)
    torch.manual_seed(0)
    weight: Any = torch.randn(40, 64, requires_grad=head == "trained")
    bias = torch.randn(40, requires_grad=head == "trained")
    lora_A, lora_B = (torch.randn(shape, requires_grad=True) for shape in ((2, 64), (40, 2)))
    dense, lora = weight, None
    if head == "packed":
        weight = PackedWeight.of(weight, QuantConfig(format="nf4"))
        dense = weight.dequantize(torch.float32)
    if head == "adapted":
        dense, lora = weight + 1.5 * lora_B @ lora_A, (lora_A, lora_B, 1.5)
    hidden = torch.randn(2, 6, 64, requires_grad=True)
    labels = torch.randint(40, (2, 6))
    labels[0, :2], labels[1, 3] = -100, -100
    logits = 0.5 * F.linear(hidden, dense, bias)
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / 0.7
    options: dict[str, Any] = {"softcap": softcap, "logit_scale": 0.5, "temperature": 0.7, "lora": lora}
    ours = linear_log_probs(hidden, weight, labels, bias, statistics=STATISTICS, **options)
    plain = plain_figures(logits, labels)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    leaves = [hidden, *([weight, bias] if head == "trained" else [lora_A, lora_B] if lora else [])]
    factors = torch.randn(2, 2, 6)
    for uses_entropy in (False, True):  # without it, a frozen head's gradient was formed in forward
        totals = [
            (factors[0] * own.log_probs).sum() + (uses_entropy * factors[1] * own.entropy).sum()
            if uses_entropy
            else (factors[0] * own.log_probs).sum()
            for own in (ours, plain)
        ]
        found = [torch.autograd.grad(total, leaves, retain_graph=True) for total in totals]
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_replaced_rows_get_their_gradient() -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(5, 8), torch.randn(11, 8), torch.tensor([1, 2, 3, 9, 2])
    tokens, values = torch.tensor([2, 9]), torch.randn(2, 8, requires_grad=True)
    ours = linear_log_probs(hidden, weight, labels, replaced=(tokens, values)).log_probs
    whole = weight.index_copy(0, tokens, values)
    plain = plain_figures(hidden @ whole.T, labels).log_probs
    torch.testing.assert_close(ours, plain)
    factors = torch.randn(5)
    torch.testing.assert_close(*(torch.autograd.grad((factors * own).sum(), values)[0] for own in (ours, plain)))


def test_figures_that_nobody_asked_for_are_not_there() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    found = linear_log_probs(hidden, weight, torch.tensor([1, -100, 2]), statistics=["is_top1"])
    assert found.is_top1 is not None and found.is_top1.dtype == torch.bool and not found.is_top1.requires_grad
    assert found.entropy is found.mean_logits is found.log_sum_sq_probs is None
    assert found.log_probs[1] == 0


def test_tokens_without_labels_give_zero_and_a_zero_gradient() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    linear_log_probs(hidden, weight, torch.full((3,), -100)).log_probs.sum().backward()
    assert hidden.grad is not None and not hidden.grad.any()


def test_memory_is_bounded_whatever_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(chunks, "SOFTMAX_BYTES", 1 << 16)
    monkeypatch.setattr(frozen_weight, "SLICE_BYTES", 1 << 18)
    labels = torch.arange(64)
    for vocabulary in (1000, 8000):
        head = PackedWeight.of(torch.randn(vocabulary, 64), QuantConfig(format="int8"))
        hidden = torch.randn(64, 64, requires_grad=True)
        with StorageTrace() as trace:
            for _ in range(2):  # the first call makes tables that stay
                linear_log_probs(hidden, head, labels, statistics=STATISTICS).log_probs.sum().backward()
        assert trace.peak()[0] < head.storage_bytes() + 4 * hidden.nbytes + 5 * (1 << 18)


def test_bf16_is_as_near_to_fp32_as_the_logits_are() -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(64, 256), torch.randn(500, 256) / 16, torch.randint(500, (64,))
    expected = plain_figures(hidden @ weight.T, labels).log_probs
    rounded, head = hidden.bfloat16(), weight.bfloat16()
    ours = linear_log_probs(rounded, head, labels).log_probs - expected
    plain = plain_figures((rounded @ head.T).float(), labels).log_probs - expected
    assert ours.norm() <= 1.01 * plain.norm()


def test_wrong_arguments_are_refused() -> None:
    hidden, weight, labels = torch.randn(2, 3, 4), torch.randn(7, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(InputError, match=r"labels should have the shape \(2, 3\); got \(2, 2\)"):
        linear_log_probs(hidden, weight, labels[:, 1:])
    with pytest.raises(InputError, match=r"statistics must be of entropy.*; got loss"):
        linear_log_probs(hidden, weight, labels, statistics=["loss"])
    with pytest.raises(InputError, match="temperature must be above 0; got 0"):
        linear_log_probs(hidden, weight, labels, temperature=0)
    with pytest.raises(InputError, match="softcap must be above 0"):
        linear_log_probs(hidden, weight, labels, softcap=0.0)
    with pytest.raises(InputError, match=r"labels must be in \[0, 7\).*got 7"):
        linear_log_probs(hidden, weight, labels + 7)
