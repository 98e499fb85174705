"""Tests of GPT-2's Conv1D (y = x W + b, W of shape (in, out)) against transformers and peft, from file to file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_lite import (
    LoraConfig,
    QuantConfig,
    add_lora_,
    export_merged,
    load_adapter_,
    load_quantized,
    merge_lora_,
    quantize_base_,
    save_adapter,
    unmerge_lora_,
)
from qlora_lite.checkpoints.safetensors_read import TensorFiles
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight

TOKENS = torch.arange(10).view(2, 5)
ADAPTED = ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=48, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=1)
    target = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(target)
    return target


def plain(folder: Path) -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(folder: Path, **quant: Any) -> Any:
    model = load_quantized(folder, QuantConfig(**quant), dtype=torch.float32)
    add_lora_(model, LoraConfig(rank=3, alpha=7, target_modules=["c_attn", "c_proj"]))
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    return model.eval()


def packed_and_back(weight: Tensor, config: QuantConfig) -> Tensor:
    """An (in, out) weight after its (out, in) was packed."""
    return PackedWeight.of(weight.T.contiguous(), config).dequantize(torch.float32).T


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("on_disk", [True, False])
def test_the_model_computes_with_its_weights_packed_as_out_in(folder: Path, format: str, on_disk: bool) -> None:
    config = QuantConfig(format=format)
    theirs = plain(folder)
    if on_disk:
        ours = load_quantized(folder, config, dtype=torch.float32)
    else:
        ours = plain(folder)
        assert len(quantize_base_(ours, config)) == 8
    assert isinstance(ours.transformer.h[0].attn.c_attn, QuantizedLinear)
    for block in theirs.transformer.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.weight.data = packed_and_back(layer.weight.data, config)
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits)


@pytest.mark.parametrize("quant", [{}, {"format": "int8"}, {"format": "none"}])
def test_both_exports_are_read_by_transformers(folder: Path, tmp_path: Path, quant: dict[str, Any]) -> None:
    model = adapted(folder, **quant)
    export_merged(model, tmp_path / "live", torch.float32)
    save_adapter(model, tmp_path / "adapter")
    config = QuantConfig(**quant)
    options: dict[str, Any] = {"config": config, "dtype": torch.float32, "load_dtype": torch.float32}
    merge_checkpoint(folder, tmp_path / "adapter", tmp_path / "disk", **options)
    live, disk, before = (dict(TensorFiles(path).items()) for path in (tmp_path / "live", tmp_path / "disk", folder))
    assert live.keys() == disk.keys() == before.keys()
    assert all(torch.equal(tensor, disk[name]) and tensor.shape == before[name].shape for name, tensor in live.items())
    torch.testing.assert_close(plain(tmp_path / "live")(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    for base, expected in (("dequantized", packed_and_back), ("original", lambda weight, config: weight)):
        export_merged(model, tmp_path / base, torch.float32, base=base)
        written = dict(TensorFiles(tmp_path / base).items())["transformer.h.0.attn.c_attn.weight"]
        weight = before["transformer.h.0.attn.c_attn.weight"]
        weight = weight if config.format == "none" else expected(weight, config)
        delta = lora_layers(model)["transformer.h.0.attn.c_attn"].delta
        torch.testing.assert_close(written, weight + delta.scaling * joined(model))


def joined(model: Any) -> Tensor:
    layer = model.transformer.h[0].attn.c_attn
    return (layer.lora_B @ layer.lora_A).T.detach()


@pytest.mark.parametrize("quant", [{}, {"format": "none"}])
def test_merging_in_memory_and_back(folder: Path, quant: dict[str, Any]) -> None:
    model = adapted(folder, **quant)
    before = model(TOKENS).logits
    merge_lora_(model)
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    unmerge_lora_(model)
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_adapters_go_to_peft_and_come_back(folder: Path, tmp_path: Path) -> None:
    import json

    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model

    model = adapted(folder, format="none")
    save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    theirs = PeftModel.from_pretrained(plain(folder), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)

    config = PeftConfig(r=2, lora_alpha=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    theirs = get_peft_model(plain(folder), config, autocast_adapter_dtype=False)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = load_quantized(folder, QuantConfig(format="none"), dtype=torch.float32)
    load_adapter_(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert all(layer.delta_weight().shape == layer.base_layer.weight.shape for layer in lora_layers(ours).values())


@pytest.mark.parametrize("quant", [{}, {"format": "none"}])
def test_gradients_are_those_of_the_plain_equation(folder: Path, quant: dict[str, Any]) -> None:
    layer = adapted(folder, **quant).transformer.h[0].attn.c_attn
    held = layer.base_layer.weight
    weight = held.T if isinstance(held, Tensor) else held.dequantize(torch.float32)
    x, grad = torch.randn(2, 5, 48, requires_grad=True), torch.randn(2, 5, 144)
    layer(x).backward(grad)
    got = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
    y = x @ weight.T + layer.bias + layer.scaling * (x @ layer.lora_A.T) @ layer.lora_B.T
    expected = list(torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], grad))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # sums of fp32 in another order
