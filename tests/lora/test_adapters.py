"""Tests of adding, removing and switching off an adapter, and of inactive adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite import LinearWithLoRA
from qlora_lite.checkpoints.hub import empty_model, read_config
from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.lora.adapters import (
    ATTRIBUTE,
    adapter_parameters,
    adapters_disabled,
    add_lora_,
    check_adapter_name,
    drop_inactive_,
    inactive_adapters,
    keep_inactive_,
    lora_layers,
    remove_lora_,
)
from qlora_lite.lora.config import LoraConfig
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.tensor_labels import TensorLabeler
from qlora_lite.memory.trace import StorageTrace


@pytest.fixture
def llama(tiny_folder: Any) -> Any:
    model = empty_model(read_config(tiny_folder), torch.float32).to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "v_proj"], 4),
        (["layers.1.self_attn.q_proj"], 1),
        (r".*layers\.0\.mlp\..*", 3),
        (lambda name, module: name.endswith("down_proj"), 2),
        (["embed_tokens"], 1),
    ],
)
def test_names_patterns_and_predicates(llama: Any, targets: Any, count: int) -> None:
    added = add_lora_(llama, LoraConfig(rank=2, target_modules=targets))
    assert len(added) == count == len(lora_layers(llama))
    trainable = {name for name, parameter in llama.named_parameters() if parameter.requires_grad}
    assert trainable == set(adapter_parameters(llama)) and len(trainable) == 2 * count


@pytest.mark.parametrize("targets", [["q_porj", "v_proj"], "nothing", "(", lambda name, module: False])
def test_what_matches_nothing_is_an_error_and_changes_nothing(llama: Any, targets: Any) -> None:
    with pytest.raises(TargetError):
        add_lora_(llama, LoraConfig(target_modules=targets))
    assert not lora_layers(llama)


def test_layers_get_the_rank_and_alpha_of_their_pattern(llama: Any) -> None:
    ranks, alphas = {"layers.0.*q_proj": 1, "q_proj|down_proj": 5}, {"down_proj": 3.0}
    add_lora_(llama, LoraConfig(rank=2, alpha=8, use_rslora=True, rank_pattern=ranks, alpha_pattern=alphas))
    for name, layer in lora_layers(llama).items():
        rank = 1 if "layers.0.self_attn.q" in name else 5 if name.endswith(("q_proj", "down_proj")) else 2
        alpha = 3 if name.endswith("down_proj") else 8
        assert (layer.rank, layer.alpha) == (rank, alpha) and layer.lora_A.shape[0] == layer.lora_B.shape[1] == rank
        assert layer.scaling == pytest.approx(alpha / rank**0.5)


def test_patterns_that_decide_for_no_layer_are_all_named(llama: Any) -> None:
    ranks, alphas = {"q_porj": 1, "q_proj": 5, "v_proj": 5}, {"lm_head": 3}
    config = LoraConfig(target_modules=["q_proj", "down_proj"], rank_pattern=ranks, alpha_pattern=alphas)
    message = (
        r"rank_pattern \['q_porj', 'v_proj'\] decides .* adapted are: down_proj, q_proj; alpha_pattern \['lm_head'\]"
    )
    with pytest.raises(TargetError, match=message):
        add_lora_(llama, config)
    assert not lora_layers(llama)


def test_adding_keeps_the_outputs_and_removing_gives_the_base_back(llama: Any) -> None:
    layer = llama.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 64)
    before = layer(x)
    add_lora_(llama, LoraConfig(rank=2))
    with pytest.raises(TargetError):
        add_lora_(llama, LoraConfig(rank=2))
    adapted = llama.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(adapted(x), before)
    remove_lora_(llama)
    assert llama.model.layers[0].self_attn.q_proj is layer


def test_disabling_restores_what_it_found() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base = model(torch.ones(1, 4))
    add_lora_(model, LoraConfig(rank=2))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    model[1].adapter_enabled = False
    adapted = model(torch.ones(1, 4))
    model[0].merge_weights()
    with pytest.raises(KeyError), adapters_disabled(model), adapters_disabled(model):
        torch.testing.assert_close(model(torch.ones(1, 4)), base)
        raise KeyError
    assert model[0].adapter_enabled and not model[1].adapter_enabled
    torch.testing.assert_close(model(torch.ones(1, 4)), adapted)


def test_all_linear_takes_each_layer_once_and_stops_at_one_that_only_training_would_adapt() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_lora_(model, LoraConfig(rank=2, target_modules=["0"]))
    with pytest.raises(TargetError, match="have adapters already"):
        add_lora_(model, LoraConfig(rank=2, target_modules=["0"]))
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    with pytest.raises(TargetError, match="would skip an adapter"):
        add_lora_(encoder, LoraConfig(rank=2))


def with_inactive() -> tuple[nn.Module, LinearWithLoRA]:
    model, layer = nn.Sequential(nn.Linear(4, 4)), LinearWithLoRA(4, 4, 2)
    layer.start_A = torch.zeros(2, 4)
    del layer.base_layer
    keep_inactive_(model, "one", {"0": layer})
    return model, layer


def test_parameters_and_state_dict_leave_inactive_adapters_out() -> None:
    plain, (model, layer) = nn.Sequential(nn.Linear(4, 4)), with_inactive()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(list(model.parameters())) == 2 and not list(model.buffers())
    assert layer not in list(model.modules())
    plain.load_state_dict(model.state_dict())


def test_inactive_adapters_follow_the_model_and_its_copies_and_keep_their_parameters() -> None:
    model, layer = with_inactive()
    other = copy.deepcopy(model)
    parameter = layer.lora_A
    model.to(torch.bfloat16)
    assert layer.lora_A is parameter and parameter.dtype == layer.start_A.dtype == torch.bfloat16
    copied = inactive_adapters(other)["one"]["0"]
    assert copied is not layer and copied.lora_A.dtype == torch.float32


def test_a_trace_labels_inactive_adapters_as_adapters_of_their_layers() -> None:
    model, _ = with_inactive()
    model.requires_grad_(False)
    labeler, trace = TensorLabeler(), StorageTrace()
    labeler.track(model)
    with trace:
        labeler.label(trace)
    held = trace.peak()[1]
    assert held[Category.ADAPTER, "0"] == 4 * (2 * 4 + 4 * 2 + 2 * 4)
    assert held.by_category()[Category.BASE_WEIGHT] == 4 * (4 * 4 + 4)


def test_dropping_the_last_inactive_adapter_removes_the_holder() -> None:
    model, layer = with_inactive()
    keep_inactive_(model, "two", {"0": layer})
    drop_inactive_(model, "one")
    assert list(inactive_adapters(model)) == ["two"]
    drop_inactive_(model, "two")
    assert not hasattr(model, ATTRIBUTE) and not inactive_adapters(model)


@pytest.mark.parametrize("name", ["", "a.b", "a b", 3, None])
def test_adapter_names_are_checked(name: str) -> None:
    model, _ = with_inactive()
    with pytest.raises(ConfigError, match="must consist of letters, digits, _ and -; got"):
        check_adapter_name(model, name)
    with pytest.raises(TargetError, match="has an adapter named 'one' already"):
        check_adapter_name(model, "one")
