"""Tests of MXFP4 checkpoints of gpt-oss, against transformers' own unpacking and plain checkpoints of the same values.

The packer is written here from the format's definition: the nearest E2M1 value, with an E8M0 scale for 32 values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_quantized, save_adapter
from qlora_lite.checkpoints.layouts import mxfp4_layout
from qlora_lite.checkpoints.layouts.mxfp4_layout import E2M1, UnpackedStack, unpacked, unpacked_tensors
from qlora_lite.checkpoints.lazy_tensors import ShapeOnlyTensor, read_slices, transposed
from qlora_lite.checkpoints.safetensors_read import stored_tensors
from qlora_lite.errors import CheckpointError, QuantizationError
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.lora.adapters import lora_layers

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 3, "head_dim": 16}
TOKENS = torch.arange(2, 14).view(2, 6)
SAID = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def packed(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Packs a stack (experts, in, out): blocks and scales."""
    values = stack.float().transpose(1, 2).unflatten(-1, (-1, 32))
    largest = values.abs().amax(-1).clamp(min=1e-30)
    exponent = largest.log2().floor() - 2  # 4 and 6 are the codes of the largest exponent
    scaled = values / torch.exp2(exponent).unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - torch.tensor(E2M1)).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8), (exponent + 127).to(torch.uint8)


@pytest.fixture(scope="module")
def folders(small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny gpt-oss in MXFP4, and the plain checkpoint of the same values in bf16, unpacked by transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    mxfp4, plain = tmp_path_factory.mktemp("mxfp4"), tmp_path_factory.mktemp("plain")
    small_model("GptOssConfig", **SIZES).to(torch.bfloat16).save_pretrained(plain)
    tensors = load_file(plain / "model.safetensors")
    written = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        blocks, scales = packed(written.pop(name))
        written |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(plain, mxfp4, dirs_exist_ok=True)
    save_file(written, mxfp4 / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": SAID}
    (mxfp4 / "config.json").write_text(json.dumps(config))
    return mxfp4, plain


def test_every_code_and_scale_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(1, 255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 16)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    ours = unpacked(blocks, scales).transpose(1, 2)
    assert torch.equal(ours.contiguous().view(torch.int16), theirs.contiguous().view(torch.int16))
    assert unpacked(blocks[:, :1, :1], torch.full((1, 1, 1), 255, dtype=torch.uint8)).isfinite().logical_not().any()


def test_slices_are_those_of_the_whole(folders: tuple[Path, Path]) -> None:
    mxfp4, plain = folders
    stored, values = stored_tensors(mxfp4 / "model.safetensors"), load_file(plain / "model.safetensors")
    for name, tensor in unpacked_tensors(stored).items():
        assert tensor.shape == tuple(values[name].shape)
        assert torch.equal(torch.cat([rows for _, rows in read_slices(tensor, 1)]), values[name])
        if not isinstance(tensor, UnpackedStack):
            continue
        for expert, matrix in enumerate(values[name]):
            view = tensor.select(expert)
            assert torch.equal(view.rows(3, 9), matrix[3:9]) and torch.equal(view.select(2).rows(0, 4), matrix[2, :4])
            across = transposed(view)  # as it is packed: rows of the file, none of which is read twice
            assert isinstance(across, mxfp4_layout._Matrix) and torch.equal(across.rows(1, 5), matrix.T[1:5])


@pytest.mark.parametrize("format", ["none", "nf4", "int8"])
def test_it_loads_like_the_plain_checkpoint(folders: tuple[Path, Path], format: str) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    mxfp4, plain = folders
    ours = load_quantized(mxfp4, QuantConfig(format))
    other = load_quantized(plain, QuantConfig(format)).state_dict()
    assert ours.state_dict().keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in ours.state_dict().items())
    assert bool([name for name in other if "experts" in name and name.endswith("packed")]) is (format != "none")
    if format == "none":
        theirs = AutoModelForCausalLM.from_pretrained(
            mxfp4, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
        )
        assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)


@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_exports_are_plain_checkpoints(folders: tuple[Path, Path], tmp_path: Path, base: str) -> None:
    from transformers import AutoModelForCausalLM

    mxfp4, plain = folders
    model = load_quantized(mxfp4)
    add_lora_(model, LoraConfig(rank=2, target_modules=["q_proj", "gate_up_proj", "down_proj"]))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "live", torch.bfloat16, base=base)
    merge_checkpoint(mxfp4, tmp_path / "adapter", tmp_path / "disk", dtype=torch.bfloat16, base=base)
    merge_checkpoint(plain, tmp_path / "adapter", tmp_path / "plain", dtype=torch.bfloat16, base=base)
    live, disk, same = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "disk", "plain"))
    released = load_file(plain / "model.safetensors")
    assert {name: tensor.shape for name, tensor in live.items()} == {name: t.shape for name, t in released.items()}
    for name, tensor in live.items():
        assert torch.equal(tensor, disk[name]) and torch.equal(tensor, same[name])
    config = json.loads((tmp_path / "live" / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["GptOssForCausalLM"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "live", dtype=torch.float32)
    if base == "dequantized":
        torch.testing.assert_close(merged(TOKENS).logits, model(TOKENS).logits.float(), atol=0.05, rtol=0.05)


def test_halves_that_do_not_fit_are_listed() -> None:
    def bytes_of(name: str, *shape: int, dtype: torch.dtype = torch.uint8) -> ShapeOnlyTensor:
        return ShapeOnlyTensor(name, dtype, shape)

    given = [
        bytes_of("a_blocks", 2, 8, 1, 16),
        bytes_of("b_scales", 2, 8, 1),
        bytes_of("c_blocks", 2, 8, 1, 15),
        bytes_of("c_scales", 2, 8, 1),
        bytes_of("d_blocks", 2, 8, 16),
        bytes_of("d_scales", 2, 8),
        bytes_of("e_blocks", 2, 8, 1, 16),
        bytes_of("e_scales", 2, 8, 1),
        bytes_of("e", 2, 32, 8, dtype=torch.bfloat16),
    ]
    with pytest.raises(CheckpointError) as caught:
        unpacked_tensors({tensor.name: tensor for tensor in given})
    sentence = str(caught.value)
    assert sentence.startswith(
        "weights in mxfp4 cannot be read: a_blocks has no scales; b_scales has no blocks; c_blocks"
    )
    assert (
        "d_blocks (2, 8, 16) and d_scales (2, 8) of torch.uint8 should be" in sentence
        and "e is there twice" in sentence
    )


def test_a_scale_that_stands_for_nan_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[f"{name}_scales"][1, 0, 0] = 255
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    for format in ("nf4", "none"):
        with pytest.raises(QuantizationError, match=name.replace(".", r"\.")):
            load_quantized(tmp_path / "bad", QuantConfig(format))
