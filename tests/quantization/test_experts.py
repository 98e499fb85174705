"""Tests of packed experts against transformers with the unpacked weights, from file to file."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_quantized, quantize_base_, save_adapter
from qlora_lite.checkpoints.safetensors_read import TensorFiles
from qlora_lite.errors import QuantizationError, TargetError
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.quantization.experts import PackedStack, RoutedExperts, packable_stacks, stacks
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.quantization.selection import left_unpacked

TOKENS = torch.arange(14).view(2, 7)
FAMILIES = ["MixtralConfig", "Qwen3MoeConfig", "Qwen2MoeConfig", "OlmoeConfig", "GptOssConfig"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(
    request: pytest.FixtureRequest, small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    model = small_model(request.param)
    for name, parameter in model.named_parameters():
        if "proj_bias" in name:
            nn.init.normal_(parameter, std=0.2)
        elif "experts" in name or "router" in name:
            nn.init.normal_(parameter, std=0.3)
    target = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(target)
    return target


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def loaded(folder: Path, **quant: Any) -> Any:
    return load_quantized(folder, QuantConfig(**quant), dtype=torch.float32)


def packed_and_back(weight: Tensor, transposed: bool, config: QuantConfig) -> Tensor:
    """A stack whose matrices were packed alone, as (out, in)."""
    turned = [matrix.T.contiguous() if transposed else matrix for matrix in weight]
    matrices = [PackedWeight.of(matrix, config).dequantize(torch.float32) for matrix in turned]
    return torch.stack([matrix.T if transposed else matrix for matrix in matrices])


def unpacked_alike(folder: Path, config: QuantConfig) -> Any:
    """transformers' model with every weight that ours packs packed and unpacked."""
    theirs = plain(folder)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.Linear) and module is not theirs.lm_head:
                module.weight.copy_(PackedWeight.of(module.weight, config).dequantize(torch.float32))
            for name in packable_stacks(module):
                stack = getattr(module, name)
                stack.copy_(packed_and_back(stack, module.is_transposed, config))
    return theirs


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_it_computes_what_transformers_computes_with_the_unpacked_weights(folder: Path, format: str) -> None:
    config = QuantConfig(format=format)
    ours, theirs = loaded(folder, format=format), unpacked_alike(folder, config)
    assert sum(isinstance(module, RoutedExperts) for module in ours.modules()) == 2
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert all(isinstance(weight, PackedStack) for weight in stacks(ours).values()) and len(stacks(ours)) == 4
    assert not any(parameter.dim() == 3 for parameter in ours.parameters())


def test_the_codes_are_those_of_each_matrix_alone_and_a_model_in_memory_gets_them_too(folder: Path) -> None:
    config = QuantConfig()
    ours, theirs = loaded(folder), plain(folder)
    weights = {name: weight.detach().clone() for name, weight in stacks(theirs).items()}
    assert quantize_base_(theirs, config)
    held, again = stacks(ours), stacks(theirs)
    assert held.keys() == again.keys() == weights.keys()
    for name, stack in held.items():
        assert stack.shape == weights[name].shape
        for index, matrix in enumerate(stack):
            plain_matrix = weights[name][index].T if stack.transposed else weights[name][index]
            alone = PackedWeight.of(plain_matrix.contiguous(), config)
            for other in (matrix, again[name][index]):
                assert all(torch.equal(value, alone.state_dict()[key]) for key, value in other.state_dict().items())
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(copy.deepcopy(ours)(TOKENS).logits, ours(TOKENS).logits)


def test_gradients_are_those_of_autograd_with_the_unpacked_weights(folder: Path) -> None:
    ours, theirs = loaded(folder), unpacked_alike(folder, QuantConfig())
    packed = next(module for module in ours.modules() if isinstance(module, RoutedExperts))
    dense = next(module for module in theirs.modules() if packable_stacks(module)).requires_grad_(False)
    x, chosen = torch.randn(9, 32), torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    chances, grad = torch.rand(9, 2), torch.randn(9, 32)
    results = []
    for module in (packed, dense):
        inputs = [x.clone().requires_grad_(), chances.clone().requires_grad_()]
        y = module(inputs[0], chosen, inputs[1])
        results.append([y, *torch.autograd.grad(y, inputs, grad)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_nothing_unpacked_is_kept_for_backward(folder: Path) -> None:
    experts = next(module for module in loaded(folder).modules() if isinstance(module, RoutedExperts))
    kept: list[Tensor] = []
    sizes = {math.prod(weight.shape[1:]) for weight in stacks(experts).values()}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        x = torch.randn(3, 32, requires_grad=True)
        experts(x, torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.rand(3, 2)).sum().backward()
    assert kept and all(tensor.numel() < min(sizes) for tensor in kept)


def adapted(folder: Path, **quant: Any) -> Any:
    model = loaded(folder, **quant)
    add_lora_(model, LoraConfig(rank=3, alpha=7, target_modules=["q_proj", "o_proj"]))
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    return model.eval()


@pytest.mark.parametrize("quant", [{}, {"format": "none"}])
def test_both_exports_are_read_by_transformers(folder: Path, tmp_path: Path, quant: dict[str, Any]) -> None:
    model = adapted(folder, **quant)
    export_merged(model, tmp_path / "live", torch.float32)
    save_adapter(model, tmp_path / "adapter")
    options: dict[str, Any] = {"dtype": torch.float32, "load_dtype": torch.float32}
    merge_checkpoint(folder, tmp_path / "adapter", tmp_path / "disk", QuantConfig(**quant), **options)
    live, disk = (dict(TensorFiles(tmp_path / name).items()) for name in ("live", "disk"))
    assert live.keys() == disk.keys()
    assert all(torch.equal(tensor, disk[name]) for name, tensor in live.items())
    torch.testing.assert_close(plain(tmp_path / "live")(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    export_merged(model, tmp_path / "original", torch.float32, base="original")
    before, after = stacks(plain(folder)), stacks(plain(tmp_path / "original"))
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    again = load_quantized(tmp_path / "original", QuantConfig(**quant), dtype=torch.float32)
    assert stacks(again).keys() == stacks(model).keys()


def test_all_linear_leaves_the_experts_and_a_model_of_them_trains(folder: Path) -> None:
    model = loaded(folder)
    assert not any("experts." in name for name in add_lora_(model, LoraConfig(rank=2)))
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    gradients = [layer.lora_B.grad for layer in lora_layers(model).values()]
    assert gradients and all(grad is not None and grad.isfinite().all() and grad.any() for grad in gradients)


def test_skipping_bad_values_and_strangers(folder: Path) -> None:
    kept = loaded(folder, skip_modules=("experts", "lm_head"))
    assert not any(isinstance(module, RoutedExperts) for module in kept.modules()) and len(stacks(kept)) == 4
    model = plain(folder)
    name, weight = next(iter(stacks(model).items()))
    with torch.no_grad():
        weight[2, 1, 3] = float("nan")
    with pytest.raises(QuantizationError, match=rf"{name}\[2\] holds nan at index \(1, 3\)"):
        quantize_base_(model, QuantConfig())
    assert not any(isinstance(module, RoutedExperts) for module in model.modules())


class Stranger(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(3, size, size))


def test_stacks_that_nobody_knows_stay_unpacked_unless_they_hold_most_values() -> None:
    model = nn.Sequential(nn.Linear(64, 64), Stranger(8), nn.Conv1d(2, 4, 3))
    assert left_unpacked(model, QuantConfig()) == {"1.weights": "a stack of matrices (3, 8, 8) of a Stranger"}
    assert quantize_base_(model, QuantConfig()) == ["0"]
    model = nn.Sequential(nn.Linear(64, 64), Stranger(64), nn.Conv1d(2, 4, 3))
    with pytest.raises(
        TargetError,
        match=r"1 stacks of matrices cannot be packed: 1\.weights \(3, 64, 64\) of a Stranger; they hold 75% of the "
        r"values to pack; if they may stay unpacked, set skip_modules=\['1'\] \(--skip-modules 1\)$",
    ):
        quantize_base_(model, QuantConfig())
    assert type(model[0]) is nn.Linear
    assert quantize_base_(model, QuantConfig(skip_modules=("1",))) == ["0"]
