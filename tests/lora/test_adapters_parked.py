"""Tests of inactive adapters: what follows the model, and what does not see them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qlora_lite import LinearWithLoRA
from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.lora.adapters import ATTRIBUTE, check_adapter_name, drop_inactive_, inactive_adapters, keep_inactive_
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.tensor_labels import TensorLabeler
from qlora_lite.memory.trace import StorageTrace


def with_inactive() -> tuple[nn.Module, LinearWithLoRA]:
    model, layer = nn.Sequential(nn.Linear(4, 4)), LinearWithLoRA(4, 4, 2)
    layer.start_A = torch.zeros(2, 4)
    del layer.base_layer
    keep_inactive_(model, "one", {"0": layer})
    return model, layer


def test_the_model_neither_trains_counts_nor_saves_it() -> None:
    plain, (model, layer) = nn.Sequential(nn.Linear(4, 4)), with_inactive()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(list(model.parameters())) == 2 and not list(model.buffers())
    assert layer not in list(model.modules())
    plain.load_state_dict(model.state_dict())


def test_it_follows_the_model_and_its_copies_and_stays_the_same_parameter() -> None:
    model, layer = with_inactive()
    other = copy.deepcopy(model)
    parameter = layer.lora_A
    model.to(torch.bfloat16)
    assert layer.lora_A is parameter and parameter.dtype == layer.start_A.dtype == torch.bfloat16
    copied = inactive_adapters(other)["one"]["0"]
    assert copied is not layer and copied.lora_A.dtype == torch.float32


def test_it_is_an_adapter_of_its_layer_in_a_trace() -> None:
    model, _ = with_inactive()
    model.requires_grad_(False)
    labeler, trace = TensorLabeler(), StorageTrace()
    labeler.track(model)
    with trace:
        labeler.label(trace)
    held = trace.peak()[1]
    assert held[Category.ADAPTER, "0"] == 4 * (2 * 4 + 4 * 2 + 2 * 4)
    assert held.by_category()[Category.BASE_WEIGHT] == 4 * (4 * 4 + 4)


def test_nothing_is_left_when_the_last_one_goes() -> None:
    model, layer = with_inactive()
    keep_inactive_(model, "two", {"0": layer})
    drop_inactive_(model, "one")
    assert list(inactive_adapters(model)) == ["two"]
    drop_inactive_(model, "two")
    assert not hasattr(model, ATTRIBUTE) and not inactive_adapters(model)


@pytest.mark.parametrize("name", ["", "a.b", "a b", 3, None])
def test_names_are_checked(name: str) -> None:
    model, _ = with_inactive()
    with pytest.raises(ConfigError, match="must consist of letters, digits, _ and -; got"):
        check_adapter_name(model, name)
    with pytest.raises(TargetError, match="has an adapter named 'one' already"):
        check_adapter_name(model, "one")
