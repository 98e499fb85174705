"""Tests of trained copies against plain torch and of token rows against a copy of the whole matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_lite.compute.cross_entropy import linear_cross_entropy
from qlora_lite.errors import TargetError
from qlora_lite.lora.auxiliary_layers import (
    TokenRows,
    TrainableTokensLayer,
    TrainedCopy,
    check_takes_token_rows,
    check_tokens,
    checkpoint_shape,
    copy_parameters,
    parameter_names,
    unpacked_rows,
)
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.quantization.quantize_model import quantize_base_
from qlora_lite.training.forward.fused_forward import fused


def whole(module: nn.Module, dtype: torch.dtype = torch.float32) -> TrainedCopy:
    return TrainedCopy(module, copy_parameters(module, parameter_names(module), dtype))


def packed_linear(format: str) -> QuantizedLinear:
    weight = PackedWeight.of(torch.randn(6, 64), QuantConfig(format=format, blocksize=64))
    return QuantizedLinear(weight, nn.Parameter(torch.randn(6)))


def packed_embedding() -> QuantizedEmbedding:
    return QuantizedEmbedding(PackedWeight.of(torch.randn(20, 8), QuantConfig(format="int8")), torch.float32)


FLOATS, TOKENS = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 19, 3]])
MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(64, 5), FLOATS),
    "norm": (lambda: nn.LayerNorm(64), FLOATS),
    "nf4": (lambda: packed_linear("nf4"), FLOATS),
    "int8": (lambda: packed_linear("int8"), FLOATS),
    "embedding": (packed_embedding, TOKENS),
    "conv1d": (lambda: Conv1D(5, 64), FLOATS),
}


@pytest.mark.parametrize("kind", MODULES)
def test_it_starts_as_its_base_learns_as_plain_torch_and_gives_the_base_back(kind: str) -> None:
    make, x = MODULES[kind]
    module = make()
    before = module(x).detach().clone()
    stored = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    copy = whole(module)
    torch.testing.assert_close(copy(x), before, rtol=1e-5, atol=1e-5)
    copy(x).square().sum().backward()
    gradients = {name: value.grad for name, value in copy.trained.items()}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    # Along the gradient the loss changes as it says.
    loss = float(copy(x).double().square().sum())
    slope = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
    with torch.no_grad():
        for value in copy.trained.values():
            value -= value.grad * (1e-4 * loss / slope)
    assert float(copy(x).double().square().sum()) == pytest.approx(loss * (1 - 1e-4), rel=3e-6)
    assert not torch.equal(copy(x), before)
    copy.adapter_enabled = False
    assert torch.equal(copy(x), before)
    assert stored.keys() == module.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in module.state_dict().items())


def test_copies_are_unpacked_and_lie_as_the_plain_checkpoint_has_them() -> None:
    model = nn.Sequential(Conv1D(6, 64))
    plain = model[0].weight.detach().clone()
    quantize_base_(model, QuantConfig(format="int8", skip_modules=()))
    packed: Any = model[0]
    assert packed.transposed and checkpoint_shape(packed, "weight") == (64, 6) == tuple(plain.shape)
    copy, x = whole(packed), torch.randn(2, 64)
    torch.testing.assert_close(copy.trained["weight"], plain, rtol=0.02, atol=0.02)
    torch.testing.assert_close(copy(x), packed(x), rtol=1e-5, atol=1e-5)
    assert copy.weight is copy.trained["weight"]
    copy.adapter_enabled = False
    assert copy.weight is packed.weight


def test_a_copy_in_fp32_computes_in_the_bases_dtype() -> None:
    norm = nn.LayerNorm(16).bfloat16()
    copy, x = whole(norm), torch.randn(4, 16).bfloat16()
    assert copy(x).dtype == torch.bfloat16 and copy.trained["weight"].dtype == torch.float32
    assert torch.equal(copy(x), norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_that_run_lean_have_the_gradient_of_plain_torch(small_model: Any, dtype: torch.dtype) -> None:
    model = small_model("LlamaConfig").to(dtype)
    before = model.model.norm
    model.model.norm = whole(before)
    layer = model.model.layers[0]
    layer.input_layernorm = whole(layer.input_layernorm)
    copies = [model.model.norm, layer.input_layernorm]
    tokens = torch.arange(24).view(2, 12)

    def gradients() -> list[Tensor]:
        for copy in copies:
            copy.trained["weight"].grad = None
        logits = model(tokens).logits.float()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return [copy.trained["weight"].grad for copy in copies]

    plain = gradients()
    with fused(model) as names:
        assert "model.norm.base_layer" in names and "model.layers.0.input_layernorm.base_layer" in names
        ours = gradients()
    for one, other in zip(ours, plain, strict=True):
        assert other.abs().max() > 0
        assert (one - other).norm() <= (1e-5 if dtype == torch.float32 else 0.03) * other.norm()


WORDS, WIDTH, TRAINED = 20, 8, (7, 2, 19)
TOKEN_IDS = torch.tensor([[7, 7, 3], [19, 0, 2]])


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
    assert torch.equal(layer(TOKEN_IDS), embedding(TOKEN_IDS))
    with torch.no_grad():
        layer.rows.values.normal_()
    whole, target = changed(weight, layer.rows.values), torch.randn(2, 3, WIDTH)
    out, reference = layer(TOKEN_IDS), F.embedding(TOKEN_IDS, whole, padding)
    assert torch.equal(out, reference)
    (out * target).sum().backward()
    (reference * target).sum().backward()
    assert whole.grad is not None and whole.grad[[7, 19]].any()
    torch.testing.assert_close(layer.rows.values.grad, whole.grad[list(TRAINED)])
    layer.adapter_enabled = False
    assert torch.equal(layer(TOKEN_IDS), embedding(TOKEN_IDS))
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
