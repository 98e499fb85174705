"""Tests of DoRA and of biases of B against their equations in plain autograd, peft, files and exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lite import (
    LoraConfig,
    LoraLayer,
    QuantConfig,
    TrainConfig,
    add_lora_,
    export_merged,
    load_adapter_,
    load_quantized,
    merge_lora_,
    save_adapter,
    train,
    unmerge_lora_,
)
from qlora_lite.checkpoints.safetensors_read import read_safetensors
from qlora_lite.compute.products import frozen_weight
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.lora.adapters import adapter_parameters, lora_layers
from qlora_lite.lora.variants import DORA, LORA, LORA_BIAS, Variant
from qlora_lite.quantization.quantize_model import quantize_base_

TOKENS = torch.arange(12).view(2, 6)


def conv1d(fan_in: int, fan_out: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(fan_out, fan_in)
    nn.init.normal_(layer.bias)
    return layer


MAKERS = {"linear": nn.Linear, "conv1d": conv1d, "embedding": nn.Embedding}


def warm_(layer: LoraLayer) -> LoraLayer:
    """A, B and magnitudes as they might be after some training."""
    with torch.no_grad():
        nn.init.normal_(layer.lora_A, std=0.3)
        nn.init.normal_(layer.lora_B, std=0.3)
        layer.lora_magnitude.mul_(1 + 0.2 * torch.randn_like(layer.lora_magnitude))
    return layer


def dora(base: nn.Module, **options: Any) -> LoraLayer:
    return LoraLayer(4, 6, base, dropout=0.0, variant="dora", **options)


def inputs(kind: str, features: int) -> Tensor:
    return TOKENS if kind == "embedding" else torch.randn(2, 6, features)


def by_the_equation(layer: LoraLayer, weight: Tensor, x: Tensor, kind: str) -> Tensor:
    """m * V / ||V|| as a dense weight, V = W0 + scaling * B A `(out, in)`, the norm a constant."""
    total = weight + layer.scaling * layer.lora_B @ layer.lora_A
    total = layer.lora_magnitude[:, None] * total / total.norm(dim=1, keepdim=True).detach()
    return F.embedding(x, total.T) if kind == "embedding" else F.linear(x, total, layer.bias)


def gradients(layer: LoraLayer, y: Tensor, x: Tensor) -> list[Tensor]:
    wanted = [layer.lora_A, layer.lora_B, layer.lora_magnitude, *([x] if x.requires_grad else [])]
    return list(torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), wanted))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("format", ["none", "nf4", "fp4", "int8"])
def test_output_and_gradients_are_those_of_the_equation(
    kind: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_weight, "SLICE_BYTES", 4 * 64 * 64)  # several slices
    holder = nn.Sequential(MAKERS[kind](128, 192))
    if format != "none" and kind != "embedding":
        quantize_base_(holder, QuantConfig(format=format))
    layer = warm_(dora(holder[0]))
    stored: Any = layer.base_layer.weight
    weight = layer.kind.as_matrix(frozen_weight.dequantized(stored, torch.float32)).detach()
    x = inputs(kind, 128)
    if x.is_floating_point():
        x.requires_grad_()
    ours, theirs = layer(x), by_the_equation(layer, weight, x, kind)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for mine, other in zip(gradients(layer, ours, x), gradients(layer, theirs, x), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("kind", MAKERS)
def test_loss_and_gradients_are_pefts(kind: str) -> None:
    import peft

    base, x = MAKERS[kind](24, 16), inputs(kind, 24)
    layer = dora(base)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["0"], use_dora=True, fan_in_fan_out=kind == "conv1d", lora_dropout=0.0
    )
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    sizes = theirs.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(layer.lora_magnitude, sizes)
    warm_(layer)
    if kind == "embedding":
        lora_A, lora_B = theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]
    else:
        lora_A, lora_B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    for mine, other in ((layer.lora_A, lora_A), (layer.lora_B, lora_B), (layer.lora_magnitude, sizes)):
        other.data.copy_(mine)
    ours, reference = layer(x), theirs(x)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    ramp = torch.linspace(-1, 1, ours.numel()).view(ours.shape)
    expected = torch.autograd.grad((reference * ramp).sum(), [lora_A, lora_B, sizes])
    for mine, other in zip(gradients(layer, ours, x), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", ["normal", "pissa", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_as_the_base_and_small_changes_of_m_are_not_lost(init: str, dtype: torch.dtype) -> None:
    holder = nn.Sequential(nn.Linear(64, 32).to(dtype))
    x = torch.randn(200, 64, dtype=dtype)
    expected = holder(x)
    add_lora_(holder, LoraConfig(4, 6, target_modules=["0"], init_lora_weights=init, variant="dora"))
    start = holder(x)
    torch.testing.assert_close(start, expected, rtol=0.01, atol=1e-5 if dtype == torch.float32 else 0.004)
    with torch.no_grad():
        holder[0].lora_magnitude.mul_(1.01)
    # In bf16 1.01 itself would be 1.0078.
    bias = holder[0].bias.double()
    before, after = expected.double() - bias, holder(x).double() - bias
    assert ((after * before).sum() / before.square().sum()).item() == pytest.approx(1.01, abs=0.001)


def adapted(folder: Path, format: str, targets: list[str]) -> Any:
    model = load_quantized(folder, QuantConfig(format=format, blocksize=64), dtype=torch.float32)
    add_lora_(model, LoraConfig(3, 7, target_modules=targets, variant="dora"))
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        warm_(layer)
    return model.eval()


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens", "v_proj"]])
def test_files_go_both_ways_with_peft(tiny_folder: Path, tmp_path: Path, targets: list[str]) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    ours = adapted(tiny_folder, "none", targets)
    save_adapter(ours, tmp_path / "ours")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS).logits, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_quantized(tiny_folder, QuantConfig(format="none"), dtype=torch.float32)
    load_adapter_(back, tmp_path / "theirs")
    torch.testing.assert_close(back.eval()(TOKENS).logits, ours(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert {layer.variant for layer in lora_layers(back).values()} == {DORA}


@pytest.mark.parametrize("format", ["none", "nf4"])
def test_merging_in_memory_and_back(tiny_folder: Path, format: str) -> None:
    model = adapted(tiny_folder, format, ["q_proj", "down_proj", "embed_tokens"])
    apart = model(TOKENS).logits
    merge_lora_(model)
    torch.testing.assert_close(model(TOKENS).logits, apart, rtol=1e-4, atol=1e-4)
    unmerge_lora_(model)
    assert torch.equal(model(TOKENS).logits, apart)


def tensors(folder: Path) -> dict[str, Tensor]:
    return read_safetensors(folder / "model.safetensors")


@pytest.mark.parametrize("format", ["none", "nf4", "int8"])
@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_exports_from_memory_and_disk_are_one_and_the_report_is_right(
    tiny_folder: Path, tmp_path: Path, format: str, base: str
) -> None:
    model = adapted(tiny_folder, format, ["q_proj", "down_proj", "embed_tokens"])
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "memory", torch.float32, base=base)
    quant = QuantConfig(format=format, blocksize=64)
    done = merge_checkpoint(
        tiny_folder, tmp_path / "adapter", tmp_path / "disk", quant, torch.float32, base=base, load_dtype=torch.float32
    )
    memory, disk = tensors(tmp_path / "memory"), tensors(tmp_path / "disk")
    assert memory.keys() == disk.keys() and all(torch.equal(memory[name], disk[name]) for name in memory)
    plain = load_quantized(tiny_folder, QuantConfig(format="none"), dtype=torch.float32)
    rows = {row["name"]: row for row in done.report.to_json()["tensors"]}
    for name, layer in lora_layers(model).items():
        written = memory[f"{name}.weight"]
        stored: Any = layer.base_layer.weight
        before = frozen_weight.dequantized(stored, torch.float32).detach()
        if base == "original":
            before = plain.get_submodule(name).weight
        else:
            assert torch.equal(written, layer.effective_weight(torch.float32))
        total = layer.kind.as_matrix(before) + layer.scaling * layer.lora_B @ layer.lora_A
        total = layer.lora_magnitude[:, None] * total / total.norm(dim=1, keepdim=True)
        torch.testing.assert_close(layer.kind.as_matrix(written), total.detach(), rtol=1e-4, atol=1e-5)
        update = (written - before).norm().item()
        assert rows[f"{name}.weight"]["update_norm"] == pytest.approx(update, rel=1e-4)


def test_a_conv1d_is_exported_by_its_columns(small_model: Any, tmp_path: Path) -> None:
    small_model("GPT2Config", n_embd=64, n_head=2, n_positions=32).save_pretrained(tmp_path / "gpt2")
    for format in ("none", "nf4"):
        model = adapted(tmp_path / "gpt2", format, ["c_fc", "c_attn"])
        save_adapter(model, tmp_path / f"adapter_{format}")
        quant = QuantConfig(format=format)
        export_merged(model, tmp_path / f"memory_{format}", torch.float32)
        merge_checkpoint(
            tmp_path / "gpt2", tmp_path / f"adapter_{format}", tmp_path / f"disk_{format}", quant, torch.float32,
            load_dtype=torch.float32,
        )  # fmt: skip
        again, disk = (
            load_quantized(tmp_path / f"{way}_{format}", QuantConfig(format="none"), dtype=torch.float32)(TOKENS)
            for way in ("memory", "disk")
        )
        torch.testing.assert_close(again.logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(disk.logits, again.logits, rtol=1e-5, atol=1e-5)


def test_an_export_is_verified(tiny_folder: Path, tmp_path: Path) -> None:
    model = adapted(tiny_folder, "nf4", ["q_proj", "down_proj"])
    examples = [TokenizedExample(list(range(3, 15)), list(range(3, 15)))]
    done = export_merged(model, tmp_path / "out", torch.float32, verify=examples)
    assert done.verification is not None
    merged, original = (done.verification.merged[base] for base in ("dequantized", "original"))
    assert merged is not None and original is not None
    assert merged.mean_kl < 1e-6 < original.mean_kl


@pytest.mark.parametrize("checkpointing", ["full", "none"])
@pytest.mark.parametrize("head", [False, True])
def test_training_moves_a_b_and_the_magnitudes(tiny_folder: Path, checkpointing: str, head: bool) -> None:
    model = load_quantized(tiny_folder, QuantConfig())
    targets = ["q_proj", "down_proj", *(["lm_head"] if head else [])]
    add_lora_(model, LoraConfig(4, 8, target_modules=targets, variant="dora"))
    before = {name: value.detach().clone() for name, value in adapter_parameters(model).items()}
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    result = train(
        model, [batch], TrainConfig(steps=4, learning_rate=0.02, checkpointing=checkpointing), progress=False
    )
    assert result.losses[-1] < result.losses[0]
    assert all(not torch.equal(value, before[name]) for name, value in adapter_parameters(model).items())
    assert any(name.endswith("lora_magnitude") for name in before)


def test_what_does_not_fit_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="variant must be one of lora, dora, lora_bias; got 'dara'"):
        LoraConfig(variant="dara")
    model = adapted(tiny_folder, "none", ["q_proj"])
    save_adapter(model, tmp_path / "dora")
    other = load_quantized(tiny_folder, QuantConfig(format="none"), dtype=torch.float32)
    add_lora_(other, LoraConfig(3, 7, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="has an adapter of variant lora, and the file one of variant dora"):
        load_adapter_(other, tmp_path / "dora")
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(CheckpointError, match="has magnitudes and use_dora says otherwise"):
        load_adapter_(other, tmp_path / "dora")
    name, layer = next(iter(lora_layers(model).items()))
    layer.variant = LORA
    with pytest.raises(ConfigError, match="the same dropout, use_rslora and variant"):
        save_adapter(model, tmp_path / name)


def test_a_row_of_zeros_stays_one() -> None:
    base = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        base.weight[1].zero_()
    layer, x = dora(base), torch.randn(3, 8)
    assert torch.equal(layer(x), base(x)) and layer.effective_weight(torch.float32).isfinite().all()


BIASED = {"linear": nn.Linear, "conv1d": conv1d, "convolution": lambda fan_in, fan_out: nn.Conv2d(fan_in, fan_out, 3)}


def with_biases_of_B(base: nn.Module) -> LoraLayer:
    layer = LoraLayer(4, 6, base, dropout=0.0, variant="lora_bias", use_rslora=True)
    assert not layer.lora_bias.any()
    for parameter in layer.lora_parameters.values():
        nn.init.normal_(parameter, std=0.3)
    return layer


def biased_inputs(kind: str) -> Tensor:
    return torch.randn(2, 24, 5, 5) if kind == "convolution" else torch.randn(2, 6, 24)


@pytest.mark.parametrize("format", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_of_B_is_scaled_and_added(format: str, bias: bool) -> None:
    holder = nn.Sequential(nn.Linear(64, 96, bias=bias))
    quantize_base_(holder, QuantConfig(format=format))
    layer, x = with_biases_of_B(holder[0]), torch.randn(3, 64, requires_grad=True)
    stored: Any = layer.base_layer.weight
    weight = frozen_weight.dequantized(stored, torch.float32).detach()
    low = F.linear(F.linear(x, layer.lora_A), layer.lora_B, layer.lora_bias)
    ours, theirs = layer(x), F.linear(x, weight, layer.base_layer.bias) + 6 / 2 * low
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    wanted = [*layer.lora_parameters.values(), x]
    expected = torch.autograd.grad(theirs.square().sum(), wanted)
    for mine, other in zip(torch.autograd.grad(ours.square().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    layer.merge_weights()
    torch.testing.assert_close(layer(x), theirs, rtol=1e-5, atol=1e-5)
    layer.adapter_enabled = False
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.base_layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BIASED)
def test_output_and_gradients_with_a_bias_of_B_are_pefts(kind: str) -> None:
    import peft

    base, x = BIASED[kind](24, 16), biased_inputs(kind)
    layer = with_biases_of_B(base)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["0"], lora_bias=True, use_rslora=True, fan_in_fan_out=kind == "conv1d"
    )
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    values = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, theirs.lora_B["default"].bias]
    for mine, other in zip(layer.lora_parameters.values(), values, strict=True):
        other.data.copy_(mine.view(other.shape))
    ours, reference = layer(x), theirs(x)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    ramp = torch.linspace(-1, 1, ours.numel()).view(ours.shape)
    found = torch.autograd.grad((ours * ramp).sum(), list(layer.lora_parameters.values()))
    for mine, other in zip(found, torch.autograd.grad((reference * ramp).sum(), values), strict=True):
        torch.testing.assert_close(mine.view(other.shape), other, rtol=1e-4, atol=1e-5)


@pytest.fixture
def biased_folder(small_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A checkpoint whose linear layers have biases, of values other than 0."""
    model = small_model("OPTConfig", ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "biased")
    return tmp_path / "biased"


def adapted_with_biases(folder: Path, format: str, targets: Any = "all-linear") -> Any:
    model = load_quantized(folder, QuantConfig(format=format), dtype=torch.float32)
    add_lora_(model, LoraConfig(3, 7, target_modules=targets, variant="lora_bias"))
    torch.manual_seed(0)
    for parameter in adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_files_with_biases_of_B_go_both_ways_with_peft(biased_folder: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    ours = adapted_with_biases(biased_folder, "none")
    expected = ours(TOKENS).logits
    save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["lora_bias"] is True
    plain = AutoModelForCausalLM.from_pretrained(biased_folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_quantized(biased_folder, QuantConfig(format="none"), dtype=torch.float32)
    load_adapter_(back, tmp_path / "theirs")
    assert torch.equal(back.eval()(TOKENS).logits, expected)
    assert {layer.variant for layer in lora_layers(back).values()} == {LORA_BIAS}
    merged = theirs.merge_and_unload()
    export_merged(ours, tmp_path / "merged", torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[name], value, rtol=1e-5, atol=1e-5)


def test_only_adapters_with_biases_of_B_name_the_option(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig())
    add_lora_(model, LoraConfig(2))
    save_adapter(model, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["use_dora"] is False and "lora_bias" not in config


@pytest.mark.parametrize("format", ["none", "nf4", "int8"])
def test_merges_and_exports_add_biases_of_B(biased_folder: Path, tmp_path: Path, format: str) -> None:
    model = adapted_with_biases(biased_folder, format)
    apart = model(TOKENS).logits
    save_adapter(model, tmp_path / "adapter")
    examples = [TokenizedExample(list(range(3, 15)), list(range(3, 15)))]
    done = export_merged(model, tmp_path / "memory", torch.float32, verify=examples)
    assert done.verification is not None and done.verification.merged["dequantized"].mean_kl < 1e-6
    merge_checkpoint(
        biased_folder, tmp_path / "adapter", tmp_path / "disk", QuantConfig(format=format), torch.float32,
        load_dtype=torch.float32,
    )  # fmt: skip
    memory, disk = tensors(tmp_path / "memory"), tensors(tmp_path / "disk")
    assert memory.keys() == disk.keys() and all(torch.equal(memory[name], disk[name]) for name in memory)
    rows = {row["name"]: row for row in done.report.to_json()["tensors"]}
    for name, layer in lora_layers(model).items():
        added = layer.scaling * layer.lora_bias.detach()
        torch.testing.assert_close(memory[f"{name}.bias"], layer.base_layer.bias + added)
        assert rows[f"{name}.bias"]["update_norm"] == pytest.approx(added.norm().item(), rel=1e-4)
    exported = load_quantized(tmp_path / "memory", QuantConfig(format="none"), dtype=torch.float32).eval()
    torch.testing.assert_close(exported(TOKENS).logits, apart, rtol=1e-4, atol=1e-4)
    merge_lora_(model)
    torch.testing.assert_close(model(TOKENS).logits, apart, rtol=1e-4, atol=1e-4)
    unmerge_lora_(model)
    assert torch.equal(model(TOKENS).logits, apart)


@pytest.mark.parametrize("head", [False, True])
def test_training_moves_biases_of_B(tiny_folder: Path, head: bool) -> None:
    model = load_quantized(tiny_folder, QuantConfig())
    targets = ["q_proj", "down_proj", *(["lm_head"] if head else [])]
    add_lora_(model, LoraConfig(4, 8, target_modules=targets, variant="lora_bias"))
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    result = train(model, [batch], TrainConfig(steps=4, learning_rate=0.02), progress=False)
    assert result.losses[-1] < result.losses[0]
    assert all(layer.lora_bias.any() for layer in lora_layers(model).values())


def test_what_biases_of_B_cannot_be_combined_with(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bias must be none with variant lora_bias"):
        LoraConfig(variant="lora_bias", bias="lora_only")
    model = load_quantized(tiny_folder, QuantConfig(format="none"), dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"variant must be lora on an embedding; got 'lora_bias' for .*embed_tokens"):
        add_lora_(model, LoraConfig(target_modules=["embed_tokens"], variant="lora_bias"))
    model = adapted_with_biases(tiny_folder, "none", ["q_proj"])
    with pytest.raises(ConfigError, match=r"adds a bias to layers that have none in a plain checkpoint: .*0.*q_proj"):
        export_merged(model, tmp_path / "merged", torch.float32)
    save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for wrong, message in (
        ({"use_dora": True}, "use_dora and lora_bias are set, and an adapter has one variant"),
        ({"bias": "all"}, "bias must be none with variant lora_bias"),
        ({"lora_bias": False}, "has biases of B and lora_bias says otherwise"),
    ):
        path.write_text(json.dumps(config | wrong))
        with pytest.raises(CheckpointError, match=message):
            load_adapter_(load_quantized(tiny_folder, QuantConfig(format="none")), tmp_path / "adapter")


def test_a_variant_with_parameters_needs_an_option_of_peft() -> None:
    assert Variant("plain").peft_option is None
    with pytest.raises(ConfigError, match=r"variant 'new' has parameters \(magnitudes\) and no peft_option"):
        Variant("new", parameters=DORA.parameters)
