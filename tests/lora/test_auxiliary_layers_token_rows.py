"""Trained rows of an embedding and of a head tied to it, beside a copy of the whole matrix in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lite.compute.cross_entropy import linear_cross_entropy
from qlora_lite.errors import TargetError
from qlora_lite.lora.auxiliary_layers import (
    TokenRows,
    TrainableTokensLayer,
    check_takes_token_rows,
    check_tokens,
    unpacked_rows,
)
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.layers import QuantizedEmbedding
from qlora_lite.quantization.packed_weight import PackedWeight

WORDS, WIDTH, TRAINED = 20, 8, (7, 2, 19)
TOKENS = torch.tensor([[7, 7, 3], [19, 0, 2]])


def changed(weight: Tensor, rows: Tensor) -> Tensor:
    """The whole matrix with these rows, as plain torch would train it."""
    whole = weight.detach().clone()
    whole[list(TRAINED)] = rows.detach()
    return whole.requires_grad_()


@pytest.mark.parametrize("base", ["plain", "padded", "int8"])
def test_an_embedding_with_rows_is_the_embedding_of_the_changed_matrix(base: str) -> None:
    padding = 2 if base == "padded" else None
    embedding: Any = nn.Embedding(WORDS, WIDTH, padding_idx=padding)
    weight = embedding.weight.detach()
    if base == "int8":
        embedding = QuantizedEmbedding(PackedWeight.of(weight, QuantConfig(format="int8")), torch.float32)
        weight = embedding.weight.dequantize(torch.float32)
    layer = TrainableTokensLayer(embedding, TokenRows(TRAINED, unpacked_rows(embedding, TRAINED, torch.float32)))
    assert torch.equal(layer(TOKENS), embedding(TOKENS))
    with torch.no_grad():
        layer.rows.values.normal_()
    whole, target = changed(weight, layer.rows.values), torch.randn(2, 3, WIDTH)
    out, reference = layer(TOKENS), F.embedding(TOKENS, whole, padding)
    assert torch.equal(out, reference)
    (out * target).sum().backward()
    (reference * target).sum().backward()
    assert whole.grad is not None and whole.grad[[7, 19]].any()
    torch.testing.assert_close(layer.rows.values.grad, whole.grad[list(TRAINED)])
    layer.adapter_enabled = False
    assert torch.equal(layer(TOKENS), embedding(TOKENS))
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == len(TRAINED) * WIDTH


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_head_has_the_rows_too_with_and_without_logits(bias: bool) -> None:
    embedding, head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=bias).requires_grad_(False)
    head.weight = embedding.weight
    rows = TokenRows(TRAINED, torch.randn(len(TRAINED), WIDTH))
    layer, hidden = TrainableTokensLayer(head, rows), torch.randn(5, WIDTH, requires_grad=True)
    labels = torch.tensor([7, 3, 19, -100, 2])
    whole = changed(head.weight, rows.values)
    reference = F.linear(hidden, whole, head.bias)
    torch.testing.assert_close(layer(hidden), reference)
    F.cross_entropy(reference, labels, reduction="sum").backward()
    assert hidden.grad is not None and whole.grad is not None
    expected, hidden.grad = [hidden.grad, whole.grad[list(TRAINED)]], None
    losses = {
        "logits": lambda: F.cross_entropy(layer(hidden), labels, reduction="sum"),
        "no logits": lambda: linear_cross_entropy(
            hidden, head.weight, labels, head.bias, replaced=(rows.tokens, rows.values), reduction="sum"
        ),
    }
    for make in losses.values():
        loss = make()
        torch.testing.assert_close(loss, F.cross_entropy(reference, labels, reduction="sum"))
        loss.backward()
        torch.testing.assert_close([hidden.grad, rows.values.grad], expected, rtol=1e-5, atol=1e-5)
        hidden.grad = rows.values.grad = None


def test_a_scaled_embedding_scales_trained_rows_too(small_model: Any) -> None:
    embedding = small_model("Gemma3TextConfig").get_input_embeddings()
    check_takes_token_rows("embed_tokens", embedding)
    layer = TrainableTokensLayer(embedding, TokenRows([5, 9], unpacked_rows(embedding, [5, 9], torch.float32)))
    tokens = torch.tensor([[5, 6, 9]])
    assert torch.equal(layer(tokens), embedding(tokens)) and float(embedding.embed_scale) != 1
    with torch.no_grad():
        embedding.weight[[5, 9]] *= 2
        layer.rows.values *= 2
    assert torch.equal(layer(tokens), embedding(tokens))


class Shifted(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_what_cannot_have_rows_is_refused() -> None:
    odd = Shifted(4, 4)
    with pytest.raises(TargetError, match="wte, a Shifted, computes more than rows"):
        check_takes_token_rows("wte", odd)
    odd.embed_scale = 1.0
    with pytest.raises(TargetError, match="name it in modules_to_save"):
        check_takes_token_rows("wte", odd)
    with pytest.raises(TargetError, match="Embedding, computes more"):
        check_takes_token_rows("wte", nn.Embedding(4, 4, max_norm=1.0))
    with pytest.raises(
        TargetError, match=r"trainable_token_indices 20 are outside the vocabulary, which has 20 tokens"
    ):
        check_tokens([3, 20], 20)
