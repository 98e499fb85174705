"""Tests of telling CPUs from accelerators, of device and dtype of a model, and of telling out-of-memory errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_lite.compute.devices import accelerator_pretended, is_out_of_memory, model_device, model_dtype, on_cpu


@pytest.mark.parametrize(("device", "answer"), [("cpu", True), ("meta", False), ("xpu", False)])
def test_only_a_cpu_is_one(device: str, answer: bool) -> None:
    assert on_cpu(torch.device(device)) is answer


def test_a_cpu_that_stands_for_an_accelerator_is_none_until_the_end() -> None:
    with pytest.raises(KeyError), accelerator_pretended(), accelerator_pretended():
        assert not on_cpu(torch.device("cpu"))
        raise KeyError
    assert on_cpu(torch.device("cpu"))


def test_a_model_is_where_its_first_parameter_is_and_computes_in_its_first_floats() -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, dtype=torch.bfloat16))
    model.insert(0, nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)]))
    assert model_device(model) == torch.device("cpu") and model_dtype(model) == torch.float32
    assert model_device(model[1]) == torch.device("meta") and model_dtype(model[2]) == torch.bfloat16
    assert model_device(nn.ReLU()) == torch.device("cpu") and model_dtype(nn.ReLU()) == torch.float32


def test_what_is_no_lack_of_memory_is_told_apart() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not fit")) and not is_out_of_memory(
        ValueError("can't allocate")
    )
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
