"""Tests of adapters on stacks of experts against autograd through transformers' modules with merged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_lite import (
    LoraConfig,
    QuantConfig,
    TrainConfig,
    add_lora_,
    export_merged,
    merge_lora_,
    quantize_base_,
    save_adapter,
    train,
    unmerge_lora_,
)
from qlora_lite.checkpoints.load import load_quantized
from qlora_lite.checkpoints.safetensors_read import TensorFiles
from qlora_lite.compute.products.frozen_weight import dequantized
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.export.plain_weights import plain_weights
from qlora_lite.lora.adapters import adapter_parameters, adapters_disabled, lora_layers, remove_lora_
from qlora_lite.lora.experts import unpacked_stacks
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.planning.training_rehearsal import rehearse_steps
from qlora_lite.quantization.experts import RoutedExperts

TOKENS = torch.arange(14).view(2, 7)
# Packed; and unpacked, transposed and with biases.
CASES = [("MixtralConfig", "nf4"), ("GptOssConfig", "none")]
STACKS = LoraConfig(
    rank=3, alpha=7, target_modules=["gate_up_proj", "experts.down_proj"], rank_pattern={"down_proj": 2}
)


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(
    request: pytest.FixtureRequest, small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A checkpoint, and the format that its base is loaded in."""
    family, format = request.param
    model = small_model(family, shared_expert_intermediate_size=24)
    for name, parameter in model.named_parameters():
        if "experts" in name or "router" in name or "mlp.gate" in name:
            nn.init.normal_(parameter, std=0.3)
    target = tmp_path_factory.mktemp(family)
    model.save_pretrained(target)
    return target, format


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def adapted(folder: Path, format: str, config: LoraConfig = STACKS) -> Any:
    model: Any = load_quantized(folder, QuantConfig(format=format), dtype=torch.float32)
    add_lora_(model, config)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    return model.eval()


def reference(model: Any, folder: Path) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """transformers' model of the unpacked base, A and B as leaves, and the merged weights that they make."""
    theirs = plain(folder)
    theirs.load_state_dict({weight.name: dequantized(weight.holder, torch.float32) for weight in plain_weights(model)})
    leaves = {name: p.detach().clone().requires_grad_() for name, p in adapter_parameters(model).items()}
    merged = {}
    for name, layer in lora_layers(model).items():
        delta = layer.scaling * leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]
        weight = theirs.get_parameter(name)
        merged[name] = weight.detach() + (delta if weight.shape == delta.shape else delta.mT)
    return theirs, leaves, merged


def test_outputs_and_gradients_are_those_of_autograd_with_merged_weights(case: tuple[Path, str]) -> None:
    folder, format = case
    ours = adapted(folder, format)
    theirs, leaves, merged = reference(ours, folder)
    routers = [n for n, p in theirs.named_parameters() if n.endswith(("mlp.gate.weight", "router.weight"))]
    others = [*routers, "model.embed_tokens.weight"]
    assert len(routers) == 2
    for model in (ours, theirs):
        model.requires_grad_(False)
        for name in others:
            model.get_parameter(name).requires_grad_()
    for parameter in adapter_parameters(ours).values():
        parameter.requires_grad_()
    ours(TOKENS, labels=TOKENS).loss.backward()
    loss = torch.func.functional_call(theirs, merged, (TOKENS,), {"labels": TOKENS}).loss
    loss.backward()
    assert len(leaves) == 8 and leaves.keys() == adapter_parameters(ours).keys()
    for name, leaf in leaves.items():
        torch.testing.assert_close(adapter_parameters(ours)[name].grad, leaf.grad, rtol=1e-3, atol=1e-6, msg=name)
    for name in others:
        mine, other = ours.get_parameter(name).grad, theirs.get_parameter(name).grad
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6, msg=name)
    with torch.no_grad():
        expected = torch.func.functional_call(theirs, merged, (TOKENS,)).logits
        assert not torch.allclose(expected, theirs(TOKENS).logits, atol=1e-2)
        torch.testing.assert_close(ours(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_expert_without_tokens_has_gradient_zero_and_no_update_is_ever_whole(case: tuple[Path, str]) -> None:
    routed = next(module for module in adapted(*case).modules() if isinstance(module, RoutedExperts))
    kept: list[Tensor] = []
    stack = min(math.prod(layer.weight.shape) for layer in lora_layers(routed).values())
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        chosen = torch.tensor([[0, 1], [3, 0], [1, 3]])
        routed(torch.randn(3, 32), chosen, torch.rand(3, 2)).sum().backward()
    assert all(tensor.numel() < stack for tensor in kept)
    for name, parameter in adapter_parameters(routed).items():
        assert parameter.grad is not None and [bool(part.any()) for part in parameter.grad] == [True, True, False, True]
        assert name.rpartition(".")[2] in ("lora_A", "lora_B")


def test_every_verb_knows_adapted_stacks(case: tuple[Path, str]) -> None:
    folder, format = case
    base: Any = load_quantized(folder, QuantConfig(format=format), dtype=torch.float32)
    state, logits = copy.deepcopy(base.state_dict()), base(TOKENS).logits
    model = adapted(folder, format)
    layers = lora_layers(model)
    names = [f"model.layers.{n}.mlp.experts.{stack}" for n in (0, 1) for stack in ("gate_up_proj", "down_proj")]
    assert sorted(layers) == sorted(names) and [layers[name].rank for name in names] == [3, 2, 3, 2]
    trained = model(TOKENS).logits
    assert not torch.allclose(trained, logits, atol=1e-2)
    with adapters_disabled(model):
        torch.testing.assert_close(model(TOKENS).logits, logits, rtol=1e-4, atol=1e-5)
    merge_lora_(model)
    assert all(layer.merged for layer in layers.values())
    torch.testing.assert_close(model(TOKENS).logits, trained, rtol=1e-4, atol=1e-5)
    with adapters_disabled(model):
        torch.testing.assert_close(model(TOKENS).logits, logits, rtol=1e-4, atol=1e-5)
    unmerge_lora_(model)
    assert torch.equal(model(TOKENS).logits, trained)
    torch.testing.assert_close(copy.deepcopy(model)(TOKENS).logits, trained)
    assert sorted(remove_lora_(model)) == sorted(names)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert any(isinstance(module, RoutedExperts) for module in model.modules()) == (format != "none")
    torch.testing.assert_close(model(TOKENS).logits, logits)


def test_targets_and_what_stacks_cannot_have(small_model: Callable[..., Any]) -> None:
    model = small_model("Qwen2MoeConfig", shared_expert_intermediate_size=24)
    before = list(model.state_dict())
    for wrong, message in (
        ({"dropout": 0.1}, "dropout must be 0 on a stack of experts; got 0.1"),
        (
            {"variant": "dora"},
            "variant must be lora on a stack of experts; got 'dora' for .*0.mlp.experts.down_proj",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is for linear layers; .* is a stack"),
    ):
        with pytest.raises((ConfigError, TargetError), match=message):
            add_lora_(model, LoraConfig(target_modules=["experts.down_proj"], **wrong))
    assert list(model.state_dict()) == before and len(unpacked_stacks(model)) == 4
    one = "model.layers.1.mlp.experts.gate_up_proj"
    assert add_lora_(model, LoraConfig(target_modules=r".*\.1\.mlp\.experts\.gate.*", init_lora_weights="kaiming")) == [
        one
    ]
    bound = lora_layers(model)[one].lora_A.abs().amax((1, 2))
    assert ((bound > 0.9 / 32**0.5) & (bound <= 1 / 32**0.5)).all()
    assert sorted(unpacked_stacks(model)) == sorted(
        ["model.layers.1.mlp.experts.down_proj"]
        + [f"model.layers.0.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")]
    )
    # The other stack of that module can still be packed.
    left = ("base_layer", "lm_head")
    assert "model.layers.1.mlp.experts" in quantize_base_(model, QuantConfig(skip_modules=left))


def held(phase: Any, category: Category) -> int:
    return sum(bytes_there for (kind, _), bytes_there in phase.breakdown.items() if kind is category)


def test_it_trains_as_it_was_rehearsed(case: tuple[Path, str]) -> None:
    folder, format = case
    model = adapted(folder, format)
    start = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    config = TrainConfig(steps=1, learning_rate=1e-2, lora_plus_ratio=2.0)
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    with MemoryProfiler() as profiler:
        first = train(model, [batch], config, profiler=profiler, progress=False).losses
    assert all(not torch.equal(parameter, start[name]) for name, parameter in adapter_parameters(model).items())
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items() if name in frozen)
    assert train(model, [batch], config, progress=False).losses < first
    if format == "none":
        return  # the rehearsal takes seconds
    found = rehearse_steps(folder, QuantConfig(format=format), STACKS, config, rows=2, tokens=7, dtype=torch.float32)
    size = sum(parameter.numel() * 4 for parameter in start.values())
    peaks: list[Any] = []
    for report in (profiler.report(), found):
        assert held(report.phase("optimizer"), Category.ADAPTER) == size
        backward: Any = report.phase("backward")
        # Beside the model's, the rehearsal has the tables that packing makes once.
        peaks.append(backward.live_peak - held(backward, Category.OTHER))
    # In a rehearsal each expert gets the same share of the tokens.
    assert peaks[0] == pytest.approx(peaks[1], rel=0.05)


def written(folder: Path) -> dict[str, Tensor]:
    return dict(TensorFiles(folder).items())


def test_exports_hold_the_merged_stacks(case: tuple[Path, str], tmp_path: Path) -> None:
    folder, format = case
    config = LoraConfig(rank=3, alpha=7, target_modules=["q_proj", "gate_up_proj", "experts.down_proj"])
    model = adapted(folder, format, config)
    examples = [TokenizedExample(list(range(12)), list(range(12)))]
    # Under the model's own names, which have whole stacks.
    live = export_merged(model, tmp_path / "live", torch.float32, names="model", verify=examples)
    save_adapter(model, tmp_path / "adapter")
    options: dict[str, Any] = {"dtype": torch.float32, "load_dtype": torch.float32, "names": "model"}
    quant = QuantConfig(format=format)
    disk = merge_checkpoint(folder, tmp_path / "adapter", tmp_path / "disk", quant, **options)
    figures = [{each.name: each for each in exported.report.tensors} for exported in (live, disk)]
    assert figures[0] == figures[1]
    one, other = written(tmp_path / "live"), written(tmp_path / "disk")
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for name, layer in lora_layers(model).items():
        if "experts" in name:
            assert torch.equal(one[name], layer.effective_weight(torch.float32))
            assert figures[0][name].update == pytest.approx(float(layer.delta_weight().square().sum()), rel=1e-4)
            assert figures[0][name].values == one[name].numel()
    torch.testing.assert_close(plain(tmp_path / "live")(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert live.verification is not None
    agreement = live.verification.merged["dequantized"]
    assert agreement is not None and agreement.mean_kl < 1e-6
