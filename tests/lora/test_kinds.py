from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite import Embedding, LoraLayer

TOKENS = torch.tensor([[1, 2, 3, 2], [2, 0, 9, 1]])


def warm(layer: LoraLayer) -> LoraLayer:
    """A layer whose adapter does something."""
    torch.manual_seed(3)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}, {"sparse": True}, {"padding_idx": 2, "sparse": True}],
)
def test_gradient_of_a_is_that_of_an_embedding(options: dict[str, Any]) -> None:
    layer = warm(Embedding(10, 6, rank=3, alpha=3, **options))
    peer = nn.Embedding(10, 3, _weight=layer.lora_A.detach().T.clone(), **options)
    ours, theirs = layer(TOKENS), layer.base_layer.weight[TOKENS] + peer(TOKENS) @ layer.lora_B.T
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward(inputs=[layer.lora_A])
    theirs.square().sum().backward(inputs=[peer.weight])
    assert layer.lora_A.grad is not None and peer.weight.grad is not None
    assert layer.lora_A.grad.is_sparse == peer.weight.grad.is_sparse == options.get("sparse", False)
    torch.testing.assert_close(layer.lora_A.grad.to_dense(), peer.weight.grad.to_dense().T)


def test_sparse_gradients_serve_sparse_adam() -> None:
    layer = warm(Embedding(10, 6, rank=3, sparse=True))
    before = layer.lora_A.detach().clone()
    optimizer = torch.optim.SparseAdam([layer.lora_A], lr=0.1)
    layer(TOKENS).square().sum().backward()
    optimizer.step()
    moved = (layer.lora_A != before).any(0)
    assert moved.nonzero().flatten().tolist() == [0, 1, 2, 3, 9]


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_max_norm_limits_what_is_returned_and_stores_nothing(norm_type: float) -> None:
    layer = Embedding(10, 6, rank=2, max_norm=0.5, norm_type=norm_type)
    stored = layer.base_layer.weight.clone()
    peer = nn.Embedding(10, 6, max_norm=0.5, norm_type=norm_type, _weight=stored.clone())
    torch.testing.assert_close(layer(TOKENS), peer(TOKENS))
    assert torch.equal(layer.base_layer.weight, stored)


def test_padding_row_never_moves() -> None:
    layer = warm(Embedding(10, 6, rank=2, padding_idx=1))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(TOKENS) - 1).square().sum().backward()
        optimizer.step()
    assert not layer.effective_weight(torch.float32)[1].any() and not layer(torch.tensor([1])).any()


def test_a_scaled_embedding_is_scaled_with_its_adapter() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

    base = GemmaTextScaledWordEmbedding(9, 6, 0, embed_scale=6**0.5)
    tokens, expected = torch.arange(9), None
    with torch.no_grad():
        expected = base(tokens)
    layer = LoraLayer(rank=2, alpha=4, base_layer=base, dropout=0.0)
    torch.testing.assert_close(layer(tokens), expected, rtol=0, atol=0)
    with torch.no_grad():
        layer.lora_B.normal_()
        merged = (base.weight + layer.delta_weight()) * 6**0.5
    torch.testing.assert_close(layer(tokens), merged, rtol=1e-5, atol=1e-6)
    layer.merge_weights()
    torch.testing.assert_close(layer(tokens), merged, rtol=1e-5, atol=1e-6)
