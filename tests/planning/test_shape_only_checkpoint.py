"""Tests of checkpoints of shapes only against the files of such a model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.checkpoint import Checkpoint
from qlora_lite.checkpoints.lazy_tensors import ShapeOnlyTensor
from qlora_lite.checkpoints.pack_on_load import PackedOnLoad
from qlora_lite.planning.rehearsal import rehearsal
from qlora_lite.planning.shape_only_checkpoint import ShapeOnlyCheckpoint, ShapeOnlyPackedWeight
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.packed_weight import PackedWeight


def mixtral(folder: Path) -> Path:
    """A checkpoint whose files have one tensor an expert, where the model has stacks of them."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads), dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["tied", "converted"])
def test_tensors_are_those_of_the_files_in_reading_order(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    folder = tiny_folder if kind == "tied" else mixtral(tmp_path)
    model = hub.empty_model(hub.read_config(folder), torch.bfloat16)
    architecture.tie(model)
    shape_only, read = (
        ShapeOnlyCheckpoint(model, QuantConfig(), torch.bfloat16),
        Checkpoint.open(folder, model, QuantConfig()),
    )
    assert list(shape_only.tensors) == list(read.tensors)
    for name, tensor in shape_only.tensors.items():
        assert tensor.shape == read.tensors[name].shape


def test_rows_of_tensors_without_values() -> None:
    tensor = ShapeOnlyTensor("stack", torch.bfloat16, (3, 4, 5))
    with rehearsal():
        assert tensor.rows(1, 3).shape == (2, 4, 5)
        assert tensor.select(1).rows(0, 2).shape == (2, 5)
        assert ShapeOnlyTensor("scale", torch.float32, ()).rows(0, 1).shape == ()
    assert tensor.select(1) == ShapeOnlyTensor("stack[1]", torch.bfloat16, (4, 5))


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_weights_without_values_have_the_buffers_of_packed_weights(format: str, double_quant: bool) -> None:
    config = QuantConfig(format=format, double_quant=double_quant)
    shape_only = ShapeOnlyPackedWeight((48, 96), format, config)
    made, packed = shape_only.load(torch.device("cpu")), PackedWeight.of(torch.randn(48, 96), config)
    assert {name: (buffer.shape, buffer.dtype) for name, buffer in made.named_buffers()} == {
        name: (buffer.shape, buffer.dtype) for name, buffer in packed.named_buffers()
    }
    weight = ShapeOnlyTensor("weight", torch.bfloat16, (48, 96))
    assert shape_only.step == PackedOnLoad(weight, config, format, torch.bfloat16).step


def test_packing_runs_once_for_each_shape_and_format(tiny_folder: Path) -> None:
    model = hub.empty_model(hub.read_config(tiny_folder), torch.bfloat16)
    architecture.tie(model)
    checkpoint = ShapeOnlyCheckpoint(model, QuantConfig(embedding_format="int8"), torch.float16)
    run, shapes = Counter(), set()
    for to_pack in checkpoint.weights_to_pack(model):
        shapes.add((tuple(to_pack.weight.shape), to_pack.format))
        (source,) = checkpoint.packed_weights(to_pack.name, to_pack, torch.bfloat16)
        run[(source.shape, to_pack.format)] += isinstance(source, PackedOnLoad)
    assert set(run) == shapes
    assert set(run.values()) == {1}
