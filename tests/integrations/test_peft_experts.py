"""Tests of peft's layer around packed stacks of experts. What it computes is compared with peft in peft_matrix.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from qlora_lite import QuantConfig, quantize_base_
from qlora_lite.errors import QuantizationError, TargetError
from qlora_lite.integrations.peft_experts import ParamWrapper, passed_over, stacks_as_parameters, wrapped_experts
from qlora_lite.quantization.experts import PackedStack, RoutedExperts


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def packed(request: pytest.FixtureRequest, import_script: Callable[[str], Any]) -> Any:
    return import_script("tests/interop/peft_pairs.py").packed_model("nf4", family=request.param)


@pytest.fixture
def experts(packed: Any) -> RoutedExperts:
    return packed.model.layers[0].mlp.experts  # type: ignore[no-any-return]


def adapter(target: nn.Module, name: str) -> Any:
    """The wrapper of a stack, with an A and a B that are not 0."""
    options = {"config": peft.LoraConfig(), "parameter_name": name, "r": 2, "lora_alpha": 3}
    made: Any = wrapped_experts(target, "default", **options)
    for part in (made.lora_A["default"], made.lora_B["default"]):
        nn.init.normal_(part.weight, std=0.3)
    return made


def call(module: nn.Module) -> Tensor:
    torch.manual_seed(3)
    x, weights = torch.randn(6, 32), torch.rand(6, 2)
    return module(x, torch.tensor([[0, 1], [1, 2], [2, 0]] * 2), weights)  # type: ignore[no-any-return]


def test_each_expert_has_its_own_update(experts: RoutedExperts) -> None:
    outer = adapter(adapter(experts, "gate_up_proj"), "down_proj")
    found, base = call(outer), call(experts)
    assert not torch.allclose(found, base)
    plain = experts.as_plain()
    assert plain is None and isinstance(experts.down_proj, PackedStack)  # nothing is left of the wrapper
    for enabled in (False, True):
        for layer in (outer, outer.base_layer):
            layer.enable_adapters(enabled)
        assert torch.equal(call(outer), found if enabled else base)
    outer.merge()
    outer.base_layer.merge()
    torch.testing.assert_close(call(outer), found, rtol=1e-4, atol=1e-5)
    outer.unmerge()
    outer.base_layer.unmerge()
    assert torch.equal(call(outer), found)


def test_a_merged_module_is_that_of_transformers(import_script: Callable[[str], Any]) -> None:
    pairs = import_script("tests/interop/peft_pairs.py")
    for family in ("mixtral", "gpt_oss"):
        experts = pairs.packed_model("nf4", family=family).model.layers[0].mlp.experts
        outer = adapter(adapter(experts, "gate_up_proj"), "down_proj")
        found, shape = call(outer), experts.down_proj.shape
        whole = outer.unload_and_optionally_merge_module(merge=True)
        assert type(whole).__module__.startswith("transformers.models") and whole.down_proj.shape == shape
        torch.testing.assert_close(call(whole), found, rtol=1e-4, atol=1e-5)
        experts = pairs.packed_model("nf4", family=family).model.layers[0].mlp.experts
        half = adapter(experts, "down_proj").unload_and_optionally_merge_module(merge=True)
        assert isinstance(half, RoutedExperts) and isinstance(half.down_proj, nn.Parameter)
        assert isinstance(half.gate_up_proj, PackedStack)


def test_what_cannot_be_merged_is_named(experts: RoutedExperts) -> None:
    broken = adapter(experts, "down_proj")
    broken.lora_B["default"].weight.data[0, 4] = float("nan")  # rank 1 of expert 1
    with pytest.raises(QuantizationError, match="down_proj of expert 1 merged with default holds NaN"):
        broken.merge()
    assert broken.merged_weight is None and not broken.merged


def test_a_stack_that_was_left_unpacked_is_adapted_the_same_way(small_model: Callable[..., Any]) -> None:
    model = small_model("MixtralConfig", num_hidden_layers=1)
    quantize_base_(model, QuantConfig(skip_modules=("down_proj",)))
    experts: Any = model.model.layers[0].mlp.experts
    assert isinstance(experts, RoutedExperts) and isinstance(experts.down_proj, nn.Parameter)
    outer = adapter(experts, "down_proj")
    before, values = call(outer), experts.down_proj.detach().clone()
    assert not torch.equal(before, call(experts))
    outer.merge()
    torch.testing.assert_close(call(outer), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(experts.down_proj, values)


def test_stacks_are_among_the_parameters_within_the_block_alone(experts: RoutedExperts) -> None:
    own = [name for name, _ in experts.named_parameters(recurse=False)]
    with stacks_as_parameters(experts):
        listed = dict(experts.named_parameters(recurse=False))
        assert next(iter(listed)) == "gate_up_proj" and {"gate_up_proj", "down_proj", *own} == listed.keys()
        assert listed["down_proj"].is_meta and listed["down_proj"].shape == experts.down_proj.shape
        assert [name for name, _ in experts.named_parameters()] == own
    assert [name for name, _ in experts.named_parameters(recurse=False)] == own


def test_experts_are_not_adapted_as_a_whole(experts: RoutedExperts) -> None:
    with pytest.raises(TargetError, match=r"name them in target_parameters \(gate_up_proj, down_proj\)"):
        wrapped_experts(experts, "default", config=peft.LoraConfig(), parameter_name=None)
    assert passed_over(experts.down_proj, "default") is experts.down_proj
    assert ParamWrapper.__name__ == "ParamWrapper"  # by which peft knows it
