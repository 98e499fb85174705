"""Tests of layers that are multiplied at once: the same bits as alone, with what holds now, and never a stale part."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_lite.generation import joined_products as joined
from qlora_lite.generation.repacked_codes import decode_copies, decode_copy_bytes
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.kernels import bnb
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight

pytestmark = pytest.mark.skipif(not bnb.has_avx512bf16(), reason="bitsandbytes' kernel needs AVX512-BF16")
HEIGHTS = {"q": 64, "k": 32, "v": 32, "o": 64}


class Attention(nn.Module):
    """Three layers with one input, and one with another."""

    def __init__(self, adapted: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, height in HEIGHTS.items():
            bias = nn.Parameter(torch.randn(height).bfloat16(), requires_grad=False) if name == "k" else None
            layer: Any = QuantizedLinear(PackedWeight.of(torch.randn(height, 64), QuantConfig()), bias)
            if adapted:
                layer = LoraLayer(4, 8, layer, dropout=0.5)
                nn.init.normal_(layer.lora_B)
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> list[Tensor]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return [q, k, v, self.o(q)]


def weights(model: nn.Module) -> list[PackedWeight]:
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


@pytest.fixture(params=[False, True], ids=["base", "adapted"])
def model(request: pytest.FixtureRequest) -> Any:
    return Attention(request.param).eval()


@pytest.fixture
def heights(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with the rows of the weights of each joined product."""
    made: list[int] = []
    product = joined.copy_product

    def watched(rows: Tensor, copy: Any, *args: Any) -> Tensor:
        made.append(copy.codes.shape[0])
        return product(rows, copy, *args)

    monkeypatch.setattr(joined, "copy_product", watched)
    return made


def steps(model: Any, count: int = 3, rows: int = 2) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(rows, 1, 64, generator=generator).bfloat16() for _ in range(count)]
    with torch.no_grad():
        return [model(x) for x in inputs]


def alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The steps with copies that are not joined."""
    with monkeypatch.context() as patch:
        patch.setattr(joined, "_suits", lambda x: False)
        with decode_copies(model):
            return steps(model)


@pytest.mark.parametrize("rows", [1, 2])
def test_joined_layers_give_the_bits_of_each_alone(
    model: Any, rows: int, heights: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = alone(model, monkeypatch)
    assert not heights
    with decode_copies(model) as taken:
        together = steps(model)
        assert heights == [128, 128]  # the first step learns; then one product for three layers
        storages = {weight.decode_copy.codes.untyped_storage().data_ptr() for weight in weights(model)}  # type: ignore[union-attr]
        assert len(storages) == 2 and taken == sum(map(decode_copy_bytes, weights(model)))
        assert steps(model, rows=40) and len(heights) == 2  # a prompt
    for first, second in zip(apart, together, strict=True):
        for ours, theirs in zip(first, second, strict=True):
            assert ours.is_contiguous() and torch.equal(ours, theirs)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_changes_between_steps_is_seen(model: Any, heights: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 64).bfloat16()
    with decode_copies(model), torch.no_grad():
        steps(model)
        first = model(x)
        x.mul_(2)  # the same tensor with other values
        assert not torch.equal(model(x)[0], first[0])
        if isinstance(model.k, LoraLayer):
            before = model(x)
            model.k.lora_B.data.mul_(-3)  # raises no version counter
            after = model(x)
            assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
            model.k.adapter_enabled = False
            assert not torch.equal(model(x)[1], after[1])
            model.k.merge_weights()
            model.k.adapter_enabled = True
            torch.testing.assert_close(model(x)[1], after[1], rtol=0.05, atol=0.2)
        joined_before = len(heights)
        weights(model)[1].packed.random_(0, 256)
        changed = model(x)
        assert len(heights) == joined_before  # all of them are multiplied alone again
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1], changed[1], rtol=0.05, atol=0.3)


def test_layers_that_stop_sharing_their_input_are_not_joined_any_more(model: Any, heights: list[int]) -> None:
    with decode_copies(model), torch.no_grad():
        steps(model)
        made = len(heights)
        one, other = torch.randn(2, 1, 64).bfloat16()
        for x in (one, other, one):
            model.q(x)
        assert len(heights) == made + 1
        assert torch.equal(model.k(other), model.k(other.clone()))


def test_a_deep_copy_is_an_ordinary_model(model: Any) -> None:
    """Within the block it would else keep exchanged forwards for good, and as many bytes of copied codes."""
    before = steps(copy.deepcopy(model), rows=40)
    with decode_copies(model):
        steps(model)
        made = copy.deepcopy(model)
        assert any("forward" in vars(module) for module in model.modules())
    assert not any("forward" in vars(module) for module in made.modules())
    assert all(vars(weight)["_decode_copy"] is None for weight in weights(made))
    for one, other in zip(steps(made, rows=40), before, strict=True):
        assert all(map(torch.equal, one, other))


def test_gradients_are_those_of_training(model: Any, heights: list[int]) -> None:
    if not isinstance(model.q, LoraLayer):
        return
    with decode_copies(model):
        steps(model)
        made = len(heights)
        model.eval()(torch.randn(2, 64).bfloat16())[0].float().sum().backward()
    assert len(heights) == made and model.q.lora_A.grad.abs().sum() > 0


def test_layers_that_others_have_joined_since_are_joined_again(model: Any, heights: list[int]) -> None:
    with decode_copies(model):
        before = steps(model)
        for layer in model.children():  # as if another adapter had taken the places of these layers
            own = vars(layer).pop("forward")
            layer.kept = own
        with joined.joined_products(model):
            again = steps(model)
        for layer in model.children():
            layer.forward = vars(layer).pop("kept")
        made = len(heights)
        last = steps(model)
        assert len(heights) == made + 3
    for first, second, third in zip(before[1:], again[1:], last[1:], strict=True):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))
