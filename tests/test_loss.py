"""The loss without the logits against F.cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qlora_lite import loss as loss_module
from qlora_lite.config import QuantConfig
from qlora_lite.errors import InputError
from qlora_lite.loss import linear_cross_entropy
from qlora_lite.quantize import PackedWeight


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
