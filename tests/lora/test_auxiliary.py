"""Tests of modules_to_save, bias and trainable_token_indices on a model, whose base must not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite import LoraConfig, MemoryProfiler, QuantConfig, TrainConfig, add_lora_, quantize_base_, train
from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.lora.adapters import adapter_parameters, adapters_disabled, freeze_base_, lora_layers, remove_lora_
from qlora_lite.lora.auxiliary import find_modules_to_save, trainable_tokens_layers, trained_copies, unwrapped_modules
from qlora_lite.lora.multi_adapter import merge_lora_, unmerge_lora_
from qlora_lite.memory.breakdown import Category
from qlora_lite.quantization.experts import PackedStack
from qlora_lite.quantization.packed_weight import PackedWeight

TOKENS = torch.arange(24).view(2, 12) % 60 + 2
BATCH = {"input_ids": TOKENS, "labels": TOKENS}
ALL = {"modules_to_save": ["norm", "lm_head", "input_layernorm"], "bias": "all", "trainable_token_indices": [3, 9]}


def with_auxiliary(model: Any, **options: Any) -> Any:
    add_lora_(model, LoraConfig(**{"rank": 2, "target_modules": ["q_proj"], **options}))
    return model


def moved(model: Any) -> None:
    """Every trained value is another one."""
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.1 * torch.randn_like(parameter)


def test_all_that_is_trained_learns_and_the_base_is_there_again_bit_for_bit(small_model: Any) -> None:
    model = small_model("Qwen2Config")
    quantize_base_(model, QuantConfig(embedding_format="int8"))
    before, structure = model(TOKENS).logits, dict(model.named_modules())
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [f"model.layers.{index}.self_attn.q_proj" for index in (0, 1)]
    assert add_lora_(model, LoraConfig(rank=2, target_modules=["q_proj"], **ALL)) == names
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    parameters = adapter_parameters(model)
    attention = "model.layers.1.self_attn"
    expected = {f"{attention}.q_proj.{part}" for part in ("lora_A", "lora_B", "trained_bias")}
    expected |= {f"{attention}.k_proj.trained.bias", f"{attention}.v_proj.trained.bias", "model.norm.trained.weight"}
    expected |= {"model.layers.1.input_layernorm.trained.weight", "model.embed_tokens.rows.values"}
    assert {name for name in parameters if "layers.0" not in name} == expected | {"lm_head.trained.weight"}
    assert {id(p) for p in parameters.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    result = train(model, [BATCH], TrainConfig(steps=3, learning_rate=0.01), progress=False)
    assert result.logits_reason is None and result.losses[-1] < result.losses[0]
    still = [name for name, parameter in parameters.items() if torch.equal(parameter, start[name])]
    assert still == []
    with adapters_disabled(model):
        assert torch.equal(model(TOKENS).logits, before)
        with pytest.raises(ConfigError, match="adapters are switched off"):
            train(model, [BATCH], TrainConfig(steps=1), progress=False)
    trained = model(TOKENS).logits
    assert not torch.allclose(trained, before, atol=1e-3)
    merge_lora_(model)
    torch.testing.assert_close(model(TOKENS).logits, trained, rtol=1e-4, atol=1e-4)
    unmerge_lora_(model)
    assert torch.equal(model(TOKENS).logits, trained)
    assert remove_lora_(model) == names
    assert dict(model.named_modules()) == structure and torch.equal(model(TOKENS).logits, before)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_a_tied_head_shares_the_rows_and_memory_is_that_of_the_rows(small_model: Any) -> None:
    model = with_auxiliary(small_model("LlamaConfig", tie_word_embeddings=True), trainable_token_indices=[5, 3])
    one, other = trainable_tokens_layers(model).values()
    assert one.rows is other.rows and list(trainable_tokens_layers(model)) == ["model.embed_tokens", "lm_head"]
    rows = [name for name in adapter_parameters(model) if "lora" not in name]
    assert rows == ["model.embed_tokens.rows.values"]
    profiler = MemoryProfiler()
    with profiler:
        result = train(model, [BATCH], TrainConfig(steps=2, learning_rate=0.01), profiler=profiler, progress=False)
    assert result.logits_reason is None
    count = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    assert count == 2 * 32 + 2 * 4 * 32
    update = profiler.report().phase("optimizer")
    assert update is not None and update.breakdown is not None
    held = update.breakdown.by_category()
    assert held[Category.ADAPTER] == held[Category.GRADIENT] == 4 * count
    assert 8 * count <= held[Category.OPTIMIZER_STATE] < 8 * count + 100
    with torch.no_grad():
        one.rows.values.zero_()
    assert not model.get_input_embeddings()(torch.tensor([3, 5])).any()
    logits = model(TOKENS).logits
    assert not logits[..., [3, 5]].any() and logits.any()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_those_of_peft(small_model: Any, bias: str) -> None:
    import peft

    options: dict[str, Any] = {"target_modules": ["c_attn"], "bias": bias}
    theirs = peft.get_peft_model(small_model("GPT2Config"), peft.LoraConfig(**options))
    expected = {name for name, p in theirs.named_parameters() if p.requires_grad and "lora" not in name}
    model = with_auxiliary(small_model("GPT2Config"), **options)
    ours = {f"base_model.model.{name}" for name in adapter_parameters(model) if "lora" not in name}
    as_pefts = {n.replace("trained_bias", "base_layer.bias").replace("trained.bias", "bias") for n in ours}
    assert as_pefts == expected and len(expected) == (13 if bias == "all" else 2)


def test_modules_to_save_are_left_out_of_all_linear(small_model: Any) -> None:
    model = small_model("LlamaConfig", num_hidden_layers=1)
    with_auxiliary(model, target_modules="all-linear", modules_to_save=["mlp"])
    assert len(lora_layers(model)) == 4
    assert [name.rpartition(".")[2] for name in trained_copies(model)] == ["gate_proj", "up_proj", "down_proj"]


REFUSED = [
    ({"modules_to_save": ["q_proj"]}, r"self_attn\.q_proj would be both adapted and trained by modules_to_save"),
    ({"modules_to_save": ["nrom"]}, r"modules_to_save \['nrom'\] matched no module; this model has: .*norm"),
    ({"modules_to_save": ["act_fn"]}, r"modules_to_save \['act_fn'\] has no parameters to train"),
    (
        {"trainable_token_indices": [1, 64]},
        r"trainable_token_indices 64 are outside the vocabulary, which has 64 tokens",
    ),
    (
        {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        "model.embed_tokens is trained by modules_to_save, so trainable_token_indices cannot train rows of it",
    ),
    (
        {"trainable_token_indices": [1], "target_modules": ["lm_head"]},
        "lm_head is adapted, so trainable_token_indices cannot train rows of it",
    ),
    ({"bias": "all"}, "bias='all' has nothing to train: no layer of this model has a bias"),
    ({"bias": "lora_only"}, "none of the adapted layers has a bias"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_contradicts_itself_is_refused_before_the_model_is_touched(
    small_model: Any, options: dict[str, Any], message: str
) -> None:
    model = small_model("LlamaConfig", num_hidden_layers=1, tie_word_embeddings=True)
    before = list(model.named_modules())
    with pytest.raises(TargetError, match=message):
        with_auxiliary(model, **options)
    assert list(model.named_modules()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


SETTINGS = [
    ({"bias": "some"}, "bias must be one of none, all, lora_only; got 'some'"),
    ({"modules_to_save": "norm"}, "modules_to_save must be a sequence of module names; got 'norm'"),
    ({"trainable_token_indices": [3, -1]}, r"trainable_token_indices must be token numbers from 0; got \[3, -1\]"),
    ({"trainable_token_indices": [3, 4, 3]}, r"trainable_token_indices must name each token once; got \[3\]"),
]


@pytest.mark.parametrize(("options", "message"), SETTINGS)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**options)


def test_modules_that_cannot_be_trained_as_copies_are_refused() -> None:
    weight = PackedWeight.of(torch.randn(4, 8), QuantConfig(format="int8"))
    model = nn.ModuleDict(
        {
            "experts": nn.ModuleDict({"up": PackedStack([weight])}),
            "batch": nn.BatchNorm1d(4),
            "limited": nn.Embedding(4, 4, max_norm=1.0),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    for name, message in (
        ("experts", "experts.up is a packed stack"),
        ("batch", "batch keeps buffers .running_mean"),
        ("limited", "limited has max_norm"),
        ("attention", "attention has parameters of its own and in its submodules out_proj"),
    ):
        with pytest.raises(TargetError, match=message):
            find_modules_to_save(model, [name])
    assert set(unwrapped_modules(model)) >= {"experts.up", "batch", "attention.out_proj"}


def test_freezing_leaves_what_is_trained(small_model: Any) -> None:
    model = with_auxiliary(small_model("LlamaConfig", num_hidden_layers=1), modules_to_save=["model.norm"])
    model.requires_grad_(True)
    freeze_base_(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter_parameters(model))
    assert "model.norm.trained.weight" in adapter_parameters(model)
