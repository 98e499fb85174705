from __future__ import annotations

import pytest
import torch

from qlora_lite.devices import accelerator_pretended, on_cpu


@pytest.mark.parametrize(("device", "answer"), [("cpu", True), ("meta", False), ("xpu", False)])
def test_only_a_cpu_is_one(device: str, answer: bool) -> None:
    assert on_cpu(torch.device(device)) is answer


def test_a_cpu_that_stands_for_an_accelerator_is_none_until_the_end() -> None:
    with pytest.raises(KeyError), accelerator_pretended(), accelerator_pretended():
        assert not on_cpu(torch.device("cpu"))
        raise KeyError
    assert on_cpu(torch.device("cpu"))
