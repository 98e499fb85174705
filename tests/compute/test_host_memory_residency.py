"""The process is looked at before each block's forward and backward, and every forward method is put back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.compute.host_memory import HoleLimit, holes_limited
from qlora_lite.surgery import repeated_blocks
from qlora_lite.training.activation_checkpointing import checkpointed

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["none", "full"])
def test_each_block_is_checked_twice(kind: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_quantized(tiny_folder, QuantConfig()).train()
    add_lora_(model, LoraConfig(rank=2))
    blocks, tokens = repeated_blocks(model), torch.randint(100, (1, 8))
    checks: list[int] = []
    monkeypatch.setattr(HoleLimit, "check", lambda limit: bool(checks.append(1)))
    with checkpointed(model, kind), holes_limited(model, CPU, kind):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        assert len(checks) == len(blocks)
        loss.backward()
    # Nothing before the first block is trained, but its own adapters are.
    assert len(checks) == 2 * len(blocks)
    assert not any("forward" in vars(block) for block in blocks)


def test_an_accelerators_memory_is_left_alone(tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig())
    with holes_limited(model, torch.device("meta"), "full"):
        assert not any("forward" in vars(block) for block in repeated_blocks(model))
