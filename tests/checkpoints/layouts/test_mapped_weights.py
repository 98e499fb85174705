"""Tests of mapped tensors and packed weights against the same ones in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_lite.checkpoints.layouts.mapped_weights import MappedFiles, MappedPackedWeight, MappedTensor
from qlora_lite.checkpoints.safetensors_read import StoredTensor, stored_tensors
from qlora_lite.checkpoints.safetensors_write import planned, write_safetensors
from qlora_lite.offload.mapped_file import is_mapped
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.packed_weight import PackedWeight


def stored(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    write_safetensors(path, {name: planned(tensor) for name, tensor in tensors.items()})
    return stored_tensors(path)


@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(double_quant=False), QuantConfig("int8")])
def test_packed_weights_are_the_same(tmp_path: Path, config: QuantConfig) -> None:
    weight = PackedWeight.of(torch.randn(512, 512), config)
    buffers = stored(tmp_path / "weight", weight.state_dict())
    files, shape = MappedFiles(), (512, 512)
    mapped = MappedPackedWeight(shape, weight.format, 64, weight.double_quant, buffers, files).load(torch.device("cpu"))
    assert is_mapped(mapped.packed) and {*dict(mapped.named_buffers())} == {*dict(weight.named_buffers())}
    assert all(torch.equal(value, getattr(mapped, name)) for name, value in weight.named_buffers())
    assert torch.equal(mapped.dequantize(torch.float32), weight.dequantize(torch.float32))
    if weight.double_quant:  # as in the files of bitsandbytes, which hold the offset as a number
        del buffers["nested_offset"]
        offset = float(weight.nested_offset)
        again = MappedPackedWeight(shape, weight.format, 64, True, buffers, files, offset).load(torch.device("cpu"))
        assert torch.equal(again.dequantize(torch.float32), weight.dequantize(torch.float32))


def test_small_and_unaligned_tensors_are_read(tmp_path: Path) -> None:
    large = torch.arange(1 << 16, dtype=torch.float32)
    given = {"large": large, "byte": torch.ones(1, dtype=torch.uint8), "shifted": large, "small": torch.ones(4, 4)}
    found, files = stored(tmp_path / "tensors", given), MappedFiles()
    for name, tensor in given.items():
        mapped = MappedTensor(found[name], files)
        assert torch.equal(mapped.mapped(), tensor) and mapped.shape == tuple(tensor.shape)
        assert is_mapped(mapped.mapped()) == (name == "large")
    part = MappedTensor(found["small"], files)
    assert torch.equal(part.rows(1, 3), given["small"][1:3]) and part.select(1).shape == (4,)
    assert (part.name, part.dtype) == ("small", torch.float32)
