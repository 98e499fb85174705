"""Tests of export plans, which are equal for models in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_adapter_, load_quantized, save_adapter
from qlora_lite.architecture import tie
from qlora_lite.checkpoints.checkpoint import Checkpoint
from qlora_lite.checkpoints.hub import empty_model, read_config
from qlora_lite.checkpoints.safetensors_read import TensorFiles
from qlora_lite.errors import CheckpointError
from qlora_lite.export.model_weights import ModelInMemory, ModelOnDisk, lazy_updates_
from qlora_lite.export.plan import ExportPlan
from qlora_lite.lora.adapters import lora_layers

QUANT = QuantConfig(embedding_format="int8")


def plans(folder: Path, adapter: Path, base: str, dtype: torch.dtype = torch.float16) -> list[ExportPlan]:
    """The plan of a model in memory, and of the same checkpoint and adapter on disk."""
    originals = TensorFiles(folder).stored
    live = load_quantized(folder, QUANT)
    empty = empty_model(read_config(folder), torch.bfloat16)
    tie(empty)
    checkpoint = Checkpoint.open(folder, empty, QUANT)
    weights_to_pack = checkpoint.weights_to_pack(empty)
    for model in (live, empty):
        load_adapter_(model, adapter)
    on_disk = ModelOnDisk(weights_to_pack, checkpoint, torch.bfloat16, lazy_updates_(empty, adapter))
    assert all(parameter.is_meta for parameter in empty.parameters())  # the adapter is not held either
    return [
        ExportPlan.of(live, base, dtype, ModelInMemory(), originals),
        ExportPlan.of(empty, base, dtype, on_disk, originals),
    ]


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    model = load_quantized(tiny_folder)
    add_lora_(model, LoraConfig(rank=3, alpha=7))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def written(plan: ExportPlan) -> dict[str, torch.Tensor]:
    return {name: torch.cat(list(tensor.slices())).view(tensor.shape) for name, tensor in plan.tensors.items()}


@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_memory_and_disk_give_the_same_bits_and_figures(tiny_folder: Path, adapter: Path, base: str) -> None:
    ours, theirs = plans(tiny_folder, adapter, base)
    one, other = written(ours), written(theirs)
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert ours.report().to_json() == theirs.report().to_json()
    packed = [figures for figures in ours.figures if figures.quantization]
    assert {figures.name for figures in packed} >= {f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down")}


def test_the_original_base_is_the_files_plus_the_update(tiny_folder: Path, adapter: Path) -> None:
    plan, _ = plans(tiny_folder, adapter, "original", torch.float32)
    model = load_quantized(tiny_folder, QuantConfig(format="none"), dtype=torch.float32)
    load_adapter_(model, adapter)
    made = written(plan)
    for name, layer in lora_layers(model).items():
        assert torch.equal(made[f"{name}.weight"], layer.effective_weight(torch.float32))


def test_what_an_export_is_compared_with(tiny_folder: Path, adapter: Path) -> None:
    plan, other = plans(tiny_folder, adapter, "dequantized")[0], plans(tiny_folder, adapter, "original")[0]
    compared = plan.compared(TensorFiles(tiny_folder).stored)  # stands for what was written
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(compared.merged["dequantized"].whole(name), TensorFiles(tiny_folder).stored[name].read().float())
    assert torch.equal(compared.merged["original"].whole(name), written(other)[name].float())
    assert compared.base.low_rank(name) is None and compared.adapter.low_rank(name) is not None
    assert not compared.missing


def test_a_missing_original(tiny_folder: Path, adapter: Path) -> None:
    model = load_quantized(tiny_folder)
    with pytest.raises(CheckpointError, match=r"needs model\.embed_tokens\.weight in full precision"):
        ExportPlan.of(model, "original", torch.float16, ModelInMemory(), {})
    plan = ExportPlan.of(model, "dequantized", torch.float16, ModelInMemory(), {})
    assert plan.compared({}).missing["original"] == "no checkpoint with its model.embed_tokens.weight was found"
