"""Tests of telling CPUs from accelerators, and out-of-memory errors from others."""

from __future__ import annotations

import pytest
import torch

from qlora_lite.compute.devices import accelerator_pretended, is_out_of_memory, on_cpu


@pytest.mark.parametrize(("device", "answer"), [("cpu", True), ("meta", False), ("xpu", False)])
def test_only_a_cpu_is_one(device: str, answer: bool) -> None:
    assert on_cpu(torch.device(device)) is answer


def test_a_cpu_that_stands_for_an_accelerator_is_none_until_the_end() -> None:
    with pytest.raises(KeyError), accelerator_pretended(), accelerator_pretended():
        assert not on_cpu(torch.device("cpu"))
        raise KeyError
    assert on_cpu(torch.device("cpu"))


def test_what_is_no_lack_of_memory_is_told_apart() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not fit")) and not is_out_of_memory(
        ValueError("can't allocate")
    )
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
