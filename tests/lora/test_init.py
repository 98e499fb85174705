"""Tests of the initializations of A and B against peft, the papers' equations, and saved adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_lite import LoraConfig, LoraLayer, QuantConfig, add_lora_, load_adapter_, load_quantized, save_adapter
from qlora_lite.errors import CheckpointError, ConfigError, TargetError
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.config import INITS
from qlora_lite.lora.init import INITIALIZERS, initialize_, principal_pair
from qlora_lite.quantization.quantize_model import quantize_base_

TOKENS = torch.arange(12).view(2, 6)


def conv1d(fan_in: int, fan_out: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(fan_out, fan_in)


def started(base: nn.Module, init: str, rank: int = 4, alpha: float = 6, **options: Any) -> LoraLayer:
    layer = LoraLayer(rank, alpha, base, dropout=0.0, **options)
    torch.manual_seed(5)
    initialize_(layer, "layer", init, {})
    return layer


def pefts_layer(base: nn.Module, init: Any, rank: int = 4) -> Any:
    import peft

    holder = nn.Sequential(base)
    config = peft.LoraConfig(r=rank, lora_alpha=6, target_modules=["0"], init_lora_weights=init)
    return peft.get_peft_model(holder, config).base_model.model[0]


def test_the_table_is_the_setting() -> None:
    assert tuple(INITIALIZERS) == INITS


@pytest.mark.parametrize("exact_side", [1024, 0])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_the_principal_pair_is_the_nearest_matrix_of_its_rank(exact_side: int, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape) @ torch.diag(0.8 ** torch.arange(shape[1]))
    lora_A, lora_B = principal_pair(matrix, 5, exact_side)
    assert lora_A.shape == (5, shape[1]) and lora_B.shape == (shape[0], 5)
    rest = torch.linalg.svdvals(matrix)[5:].norm()  # Eckart and Young
    assert (matrix - lora_B @ lora_A).norm().item() == pytest.approx(rest.item(), rel=1e-4)
    torch.testing.assert_close(lora_A.norm(dim=1), lora_B.norm(dim=0))


@pytest.mark.parametrize(("init", "theirs"), [("kaiming", True), ("gaussian", "gaussian")])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_kaiming_and_gaussian_are_pefts(init: str, theirs: Any, kind: str) -> None:
    base = nn.Linear(12, 8) if kind == "linear" else nn.Embedding(12, 8)
    reference = pefts_layer(base, theirs)
    torch.manual_seed(5)
    reference.reset_lora_parameters("default", theirs)
    ours = started(base, init)
    if kind == "linear":
        expected = reference.lora_A["default"].weight, reference.lora_B["default"].weight
    else:
        expected = reference.lora_embedding_A["default"], reference.lora_embedding_B["default"]
    assert torch.equal(ours.lora_A, expected[0]) and torch.equal(ours.lora_B, expected[1])


def test_orthogonal_is_pefts_and_begins_as_the_base() -> None:
    base = nn.Linear(12, 8)
    reference = pefts_layer(base, "orthogonal")
    torch.manual_seed(5)
    reference.orthogonal_init("default")
    ours = started(base, "orthogonal")
    assert torch.equal(ours.lora_A, reference.lora_A["default"].weight)
    assert torch.equal(ours.lora_B, reference.lora_B["default"].weight)
    assert (ours.lora_B @ ours.lora_A).abs().max() < 1e-6 < 0.05 < ours.lora_B.abs().max()


def steps(module: nn.Module, parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    """Outputs before and after each of three steps of plain gradient descent."""
    outputs = []
    for _ in range(4):
        y = module(x)
        outputs.append(y.detach())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad((y - 1).square().sum(), parameters), strict=True
        ):
            parameter.data.sub_(gradient, alpha=1e-3)
    return outputs


@pytest.mark.parametrize("make", [nn.Linear, conv1d])
def test_pissa_learns_as_pefts_does(make: Any) -> None:
    torch.manual_seed(1)
    base, x = make(12, 8), torch.randn(5, 12)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    ours = started(base, "pissa")
    learned = steps(ours, [ours.lora_A, ours.lora_B], x)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    reference = pefts_layer(base, "pissa")
    theirs = steps(reference, [reference.lora_A["default"].weight, reference.lora_B["default"].weight], x)
    for mine, other in zip(learned, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert (learned[-1] - learned[0]).abs().max() > 0.01
    low_rank = ours.lora_B @ ours.lora_A - ours.start_B @ ours.start_A
    torch.testing.assert_close(ours.delta_weight(), ours.kind.as_matrix(ours.scaling * low_rank), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_begins_as_the_packed_base_exactly(format: str, dtype: torch.dtype) -> None:
    holder = nn.Sequential(nn.Linear(64, 32).to(dtype))
    quantize_base_(holder, QuantConfig(format=format))
    x, packed = torch.randn(5, 64, dtype=dtype), holder[0]
    expected = packed(x)
    layer = started(packed, "pissa", rank=8, use_rslora=True)
    assert torch.equal(layer(x), expected)
    values = torch.linalg.svdvals(packed.weight.dequantize(torch.float32))[:8]
    torch.testing.assert_close(torch.linalg.svdvals(layer.scaling * layer.lora_B @ layer.lora_A)[:8], values)
    layer.merge_weights(torch.float32)
    assert torch.equal(layer.weight, packed.weight.dequantize(torch.float32))


def test_a_negative_scale_starts_from_the_same_part() -> None:
    base = nn.Linear(12, 8)
    plus, minus = started(base, "pissa"), started(base, "pissa", alpha=-6)
    torch.testing.assert_close(minus.scaling * minus.lora_B @ minus.lora_A, plus.scaling * plus.lora_B @ plus.lora_A)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_saved_pissa_adapter_is_one_of_twice_the_rank_for_the_plain_base(
    tiny_folder: Path, tmp_path: Path, use_rslora: bool
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model = load_quantized(tiny_folder, QuantConfig(format="none"), dtype=torch.float32)
    plain = model(TOKENS).logits
    targets = ["q_proj", "down_proj"]
    config = LoraConfig(
        3, 7, target_modules=targets, init_lora_weights="pissa", use_rslora=use_rslora, rank_pattern={"down_proj": 2}
    )
    add_lora_(model, config)
    torch.testing.assert_close(model(TOKENS).logits, plain, rtol=0, atol=0)
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_A.add_(torch.randn_like(layer.lora_A), alpha=0.1)
            layer.lora_B.add_(torch.randn_like(layer.lora_B), alpha=0.1)
    expected = model.eval()(TOKENS).logits
    assert (expected - plain).abs().max() > 1e-3
    save_adapter(model, tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert {said["r"], *said["rank_pattern"].values()} == {6, 4}
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    again = load_quantized(tiny_folder, QuantConfig(format="none"), dtype=torch.float32)
    load_adapter_(again, tmp_path / "saved")
    torch.testing.assert_close(again.eval()(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_loaded_adapter_is_not_counted_from_the_start_of_another(tiny_folder: Path, tmp_path: Path) -> None:
    plain, other = (load_quantized(tiny_folder, QuantConfig(format="none"), dtype=torch.float32) for _ in "ab")
    add_lora_(plain, LoraConfig(2, target_modules=["q_proj"], init_lora_weights="gaussian"))
    for layer in lora_layers(plain).values():
        nn.init.normal_(layer.lora_B)
    save_adapter(plain, tmp_path / "plain")
    add_lora_(other, LoraConfig(2, target_modules=["q_proj"], init_lora_weights="pissa"))
    load_adapter_(other, tmp_path / "plain")
    torch.testing.assert_close(other.eval()(TOKENS).logits, plain.eval()(TOKENS).logits)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_loftq_makes_up_for_the_principal_part_of_the_error_of_packing(tiny_folder: Path, format: str) -> None:
    original = load_quantized(tiny_folder, QuantConfig(format="none"), dtype=torch.float32).state_dict()
    model = load_quantized(tiny_folder, QuantConfig(format=format), dtype=torch.float32)
    packed = {n: m.weight for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))}
    codes = {name: weight.packed.clone() for name, weight in packed.items()}
    names = add_lora_(model, LoraConfig(4, 7, target_modules=["q_proj", "down_proj"], init_lora_weights="loftq"))
    for name in names:
        layer = model.get_submodule(name)
        error = original[f"{name}.weight"] - packed[name].dequantize(torch.float32)
        left = original[f"{name}.weight"] - layer.effective_weight(torch.float32)
        rest = torch.linalg.svdvals(error)[4:].norm()
        assert left.norm().item() == pytest.approx(rest.item(), rel=1e-3) and left.norm() < 0.95 * error.norm()
        assert torch.equal(layer.base_layer.weight.packed, codes[name])


def test_loftq_is_pefts_decomposition() -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition

    weight = torch.randn(16, 24)
    theirs = _low_rank_decomposition(weight, reduced_rank=3)
    lora_A, lora_B = principal_pair(weight, 3)
    torch.testing.assert_close(lora_B @ lora_A, theirs["L"] @ theirs["R"])
    torch.testing.assert_close(lora_A.abs(), theirs["R"].abs())


def test_loftq_on_a_packed_conv1d_takes_the_weight_the_other_way_round(small_model: Any, tmp_path: Path) -> None:
    small_model("GPT2Config", n_embd=32, n_head=2, n_positions=32).save_pretrained(tmp_path / "gpt2")
    original = load_quantized(tmp_path / "gpt2", QuantConfig(format="none"), dtype=torch.float32).state_dict()
    model = load_quantized(tmp_path / "gpt2", QuantConfig(), dtype=torch.float32)
    name = add_lora_(model, LoraConfig(4, target_modules=["c_fc"], init_lora_weights="loftq"))[0]
    layer, weight = model.get_submodule(name), original[f"{name}.weight"].T
    error = weight - layer.base_layer.weight.dequantize(torch.float32)
    assert (weight - layer.effective_weight(torch.float32)).norm() < 0.95 * error.norm()


def test_what_cannot_start_so_is_refused_and_nothing_is_changed(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig(), dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"init_lora_weights must be one of normal.*got 'pisa'"):
        LoraConfig(init_lora_weights="pisa")
    with pytest.raises(TargetError, match=r"'pissa' is for linear layers; model\.embed_tokens"):
        add_lora_(model, LoraConfig(2, target_modules=["embed_tokens"], init_lora_weights="pissa"))
    with pytest.raises(ConfigError, match=r"q_proj has the odd rank 3"):
        add_lora_(model, LoraConfig(3, target_modules=["q_proj"], init_lora_weights="orthogonal"))
    with pytest.raises(ConfigError, match=r"no 1000 singular values; .*alpha 0"):
        add_lora_(model, LoraConfig(1000, 0, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.config._name_or_path = ""
    with pytest.raises(CheckpointError, match=r"needs the checkpoint .*it has none"):
        add_lora_(model, LoraConfig(2, target_modules=["q_proj"], init_lora_weights="loftq"))
    assert not lora_layers(model)
    unpacked = load_quantized(tiny_folder, QuantConfig(format="none"))
    with pytest.raises(ConfigError, match="is not packed and has no error"):
        add_lora_(unpacked, LoraConfig(2, target_modules=["q_proj"], init_lora_weights="loftq"))


@pytest.mark.parametrize(("init", "variant"), [("pissa", "lora"), ("loftq:2", "lora"), ("normal", "dora")])
def test_memory_is_rehearsed_with_every_start(tiny_folder: Path, init: str, variant: str) -> None:
    from qlora_lite.planning.training_rehearsal import rehearse_steps
    from qlora_lite.training.config import TrainConfig

    report = rehearse_steps(
        tiny_folder,
        QuantConfig(),
        LoraConfig(2, init_lora_weights=init, variant=variant),
        TrainConfig(steps=1),
        rows=1,
        tokens=8,
    )
    assert [phase.name for phase in report.phases][:2] == ["load", "forward"]
