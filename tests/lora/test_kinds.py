"""Tests of the kinds of layers that A and B adapt: embeddings, and routers of experts against peft and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite import (
    Embedding,
    LoraConfig,
    LoraLayer,
    add_lora_,
    export_merged,
    load_adapter_,
    merge_lora_,
    save_adapter,
)
from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.lora.adapters import lora_layers, remove_lora_
from qlora_lite.lora.peft.describe import describe_adapter

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


ROUTER_TOKENS = torch.arange(14).view(2, 7)
ROUTER_CONFIG = LoraConfig(rank=3, alpha=7, target_modules=["q_proj", "gate"], dropout=0, rank_pattern={"gate": 2})


def model_with_routers(small_model: Callable[..., Any], family: str = "MixtralConfig") -> Any:
    model = small_model(family, shared_expert_intermediate_size=24)
    for name, parameter in model.named_parameters():
        if "experts" in name or "gate" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def adapted_routers(small_model: Callable[..., Any], family: str = "MixtralConfig") -> Any:
    model = model_with_routers(small_model, family)
    add_lora_(model, ROUTER_CONFIG)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.5)
    return model


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_it_routes_and_learns_as_with_the_sum_for_a_weight(small_model: Callable[..., Any]) -> None:
    model, plain = adapted_routers(small_model), model_with_routers(small_model)
    router: Any = model.model.layers[0].mlp.gate
    assert router.top_k == plain.model.layers[0].mlp.gate.top_k
    for name, layer in lora_layers(model).items():
        weight = plain.get_submodule(name).weight
        weight.data += layer.scaling * layer.lora_B.data @ layer.lora_A.data
        weight.requires_grad_(True)
    assert relative(model(ROUTER_TOKENS).logits, plain(ROUTER_TOKENS).logits) < 1e-5
    assert relative(model(ROUTER_TOKENS).logits, model_with_routers(small_model)(ROUTER_TOKENS).logits) > 1e-2
    model(input_ids=ROUTER_TOKENS, labels=ROUTER_TOKENS).loss.backward()
    plain(input_ids=ROUTER_TOKENS, labels=ROUTER_TOKENS).loss.backward()
    grad = plain.model.layers[0].mlp.gate.weight.grad
    # Of W = W0 + s B A: dB = s dW A^T, dA = s B^T dW.
    assert relative(router.lora_B.grad, router.scaling * grad @ router.lora_A.data.T) < 1e-4
    assert relative(router.lora_A.grad, router.scaling * router.lora_B.data.T @ grad) < 1e-4
    assert router.base_layer.weight.grad is None


@pytest.mark.parametrize("family", ["MixtralConfig", "Qwen3MoeConfig"])
def test_peft_reads_what_is_written_here_and_the_other_way_round(
    small_model: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    import peft

    ours = adapted_routers(small_model, family)
    save_adapter(ours, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["gate.weight"] and config["target_modules"] == ["q_proj"]
    theirs = peft.PeftModel.from_pretrained(model_with_routers(small_model, family), str(tmp_path / "ours")).eval()
    assert relative(ours(ROUTER_TOKENS).logits, theirs(ROUTER_TOKENS).logits) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = model_with_routers(small_model, family)
    assert set(load_adapter_(again, tmp_path / "theirs")) == lora_layers(ours).keys()
    assert torch.equal(ours(ROUTER_TOKENS).logits, again(ROUTER_TOKENS).logits)
    kinds = {layer.last: (layer.kind, layer.rank) for layer in describe_adapter(tmp_path / "theirs").layers}
    assert kinds == {"q_proj": ("linear", 3), "gate": ("router", 2)}


def test_what_pefts_all_linear_makes_of_a_mixtral_is_loaded(small_model: Callable[..., Any], tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(model_with_routers(small_model), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = model_with_routers(small_model)
    names = load_adapter_(ours, tmp_path)
    assert sum(name.endswith(".gate") for name in names) == 2
    assert relative(ours(ROUTER_TOKENS).logits, theirs(ROUTER_TOKENS).logits) < 1e-5


def test_it_is_merged_exported_and_taken_off(small_model: Callable[..., Any], tmp_path: Path) -> None:
    import transformers

    model, plain = adapted_routers(small_model), model_with_routers(small_model)
    found = model(ROUTER_TOKENS).logits
    merge_lora_(model)
    assert relative(model(ROUTER_TOKENS).logits, found) < 1e-5
    export_merged(model, tmp_path / "merged", torch.float32)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative(exported(ROUTER_TOKENS).logits, found) < 1e-5
    remove_lora_(model)
    assert torch.equal(model(ROUTER_TOKENS).logits, plain(ROUTER_TOKENS).logits)


def test_a_router_has_neither_dropout_nor_dora_and_is_no_linear_layer(small_model: Callable[..., Any]) -> None:
    for wrong, message in (({"dropout": 0.1}, "dropout must be 0"), ({"variant": "dora"}, "variant must be lora")):
        with pytest.raises(ConfigError, match=f"{message} on a router; got .* for model.layers.0.mlp.gate"):
            add_lora_(
                model_with_routers(small_model), LoraConfig(**{"target_modules": ["gate"], "dropout": 0.0, **wrong})
            )  # type: ignore[arg-type]
    model = model_with_routers(small_model)
    assert not [name for name in add_lora_(model, LoraConfig(dropout=0)) if name.endswith("gate")]
    with pytest.raises(TargetError, match="is a router"):
        add_lora_(
            model_with_routers(small_model), LoraConfig(target_modules=["gate"], dropout=0, init_lora_weights="pissa")
        )


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_it_computes_in_its_own_dtype_whatever_it_is_merged_into(
    small_model: Callable[..., Any], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    model = adapted_routers(small_model).to(dtypes[0])
    found = model(ROUTER_TOKENS).logits
    merge_lora_(model, dtypes[1])
    assert model(ROUTER_TOKENS).logits.dtype == found.dtype and relative(model(ROUTER_TOKENS).logits, found) < 2e-2


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_bias_trained_in_fp32_serves_a_router_in_bf16(small_model: Callable[..., Any], bias: str) -> None:
    model = model_with_routers(small_model, "GptOssConfig").to(torch.bfloat16)
    before = model(ROUTER_TOKENS).logits
    add_lora_(model, LoraConfig(rank=2, alpha=4, target_modules=["router"], dropout=0, bias=bias))
    router: Any = model.model.layers[0].mlp.router
    assert torch.equal(model(ROUTER_TOKENS).logits, before) and router.trained_bias.dtype == torch.float32
    model(input_ids=ROUTER_TOKENS, labels=ROUTER_TOKENS).loss.backward()
    assert router.trained_bias.grad.any() and router.lora_B.grad.any()


def test_a_linear_layer_that_is_called_a_router_is_a_linear_layer() -> None:
    class TheirRouter(nn.Linear):
        pass

    model = nn.Sequential(TheirRouter(8, 4), nn.Linear(4, 4))
    assert add_lora_(model, LoraConfig(rank=2, variant="dora", dropout=0.1)) == ["0", "1"]
