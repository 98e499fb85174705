"""The weights of a model in memory and on disk: the same rows and updates."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_adapter_, load_quantized, save_adapter
from qlora_lite.architecture import tie
from qlora_lite.checkpoints.checkpoint import Checkpoint
from qlora_lite.checkpoints.hub import empty_model, read_config
from qlora_lite.checkpoints.safetensors_read import TensorFiles
from qlora_lite.export.model_weights import ModelInMemory, ModelOnDisk, as_stored, lazy_updates_
from qlora_lite.export.plain_weights import weights_to_write


def test_rows_and_updates_are_the_same_in_memory_and_on_disk(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder)
    add_lora_(model, LoraConfig(rank=3, alpha=7))
    save_adapter(model, tmp_path / "adapter")
    empty = empty_model(read_config(tiny_folder), torch.bfloat16)
    tie(empty)
    checkpoint = Checkpoint.open(tiny_folder, empty, QuantConfig())
    weights_to_pack = checkpoint.weights_to_pack(empty)
    load_adapter_(empty, tmp_path / "adapter")
    on_disk = ModelOnDisk(weights_to_pack, checkpoint, torch.bfloat16, lazy_updates_(empty, tmp_path / "adapter"))
    in_memory, originals = ModelInMemory(), TensorFiles(tiny_folder).stored
    pairs = list(zip(weights_to_write(model)[0], weights_to_write(empty)[0], strict=True))
    assert any(held.delta is not None for held, _ in pairs)
    for held, stored in pairs:
        (one,), (other,) = in_memory.trained(held), on_disk.trained(stored)
        rows = one.shape[0]
        assert torch.equal(one.rows(0, rows), other.rows(0, rows)), held.name
        if held.delta is not None:
            ours, theirs = in_memory.delta(held), on_disk.delta(stored)
            assert torch.equal(ours.left, theirs.left) and torch.equal(ours.right, theirs.right)  # type: ignore[union-attr]
        if held.name in originals:
            (original,) = as_stored(originals[held.name], [one])
            assert original.shape == one.shape
