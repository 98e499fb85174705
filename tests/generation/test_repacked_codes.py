"""Tests of products of few rows: 4-bit weights with copies, int8, adapters; against plain products and bitsandbytes."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lite.compute import lora_linear
from qlora_lite.compute.devices import accelerator_pretended
from qlora_lite.compute.lora_linear import FEW_ROWS, SHORT_PROMPT
from qlora_lite.generation.repacked_codes import decode_copies, decode_copy_bytes, repacked
from qlora_lite.quantization import kernels
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.kernels import block_absmax, bnb, packed_product
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight

needs_kernel = pytest.mark.skipif(not bnb.has_avx512bf16(), reason="bitsandbytes' kernel needs AVX512-BF16")


def packed(rows: int = 96, columns: int = 128, **options: object) -> PackedWeight:
    torch.manual_seed(0)
    return PackedWeight.of(torch.randn(rows, columns) * 0.02, QuantConfig(**options))  # type: ignore[arg-type]


def unpackings(monkeypatch: pytest.MonkeyPatch) -> list[PackedWeight]:
    """Returns a list that every weight is added to when some of it is unpacked."""
    seen: list[PackedWeight] = []
    unpack = PackedWeight.dequantize_rows

    def watched(self: PackedWeight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        seen.append(self)
        return unpack(self, start, stop, dtype)

    monkeypatch.setattr(PackedWeight, "dequantize_rows", watched)
    return seen


def error(y: Tensor, x: Tensor, weight: PackedWeight) -> float:
    """Returns the relative error of y against the product of x and the unpacked weight in fp64."""
    exact = x.double() @ weight.dequantize(torch.float32).double().T
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"blocksize": 128}])
def test_order_is_that_of_bitsandbytes(options: dict[str, object]) -> None:
    weight = packed(**options)
    state = SimpleNamespace(dtype=torch.bfloat16, nested=False, shape=weight.shape, blocksize=weight.blocksize)
    state.absmax = block_absmax(weight, 0, weight.shape.numel() // weight.blocksize)
    codes, state = bnb._convert_weight_packed_for_cpu(weight.packed, state)
    ours = repacked(weight)
    assert torch.equal(ours.codes, codes) and torch.equal(ours.absmax, state.absmax)
    if bnb.has_avx512bf16():
        assert ours.codes.nbytes + ours.absmax.nbytes == decode_copy_bytes(weight)


@needs_kernel
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("rows", [1, 5, FEW_ROWS, SHORT_PROMPT])
def test_copies_multiply_without_unpacking(format: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantizedLinear(packed(format=format), nn.Parameter(torch.randn(96).bfloat16(), requires_grad=False))
    layer.bias.data.zero_()  # type: ignore[union-attr]
    x, seen = torch.randn(rows, 128).bfloat16(), unpackings(monkeypatch)
    plain = layer(x)
    assert seen
    seen.clear()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with decode_copies(layer) as taken:
        y = layer(x)
        assert not seen and taken == decode_copy_bytes(layer.weight) == 96 * 128 // 2 + 96 * 2 * 2
        layer(torch.randn(SHORT_PROMPT + 1, 128).bfloat16())  # a prompt
        assert len(seen) == 1
        assert layer.weight.decode_copy is not None
    assert layer.weight.decode_copy is None
    assert all(torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())
    # absmax in bf16 is one rounding more than the two of the plain product
    assert error(y, x, layer.weight) < 1.6 * error(plain, x, layer.weight)


@needs_kernel
def test_a_copy_is_not_used_once_the_weight_has_changed() -> None:
    layer, other = QuantizedLinear(packed()), QuantizedLinear(packed(format="nf4"))
    other.weight.packed.random_(0, 256)
    with decode_copies(layer):
        layer.load_state_dict(other.state_dict())
        assert layer.weight.decode_copy is None
    with decode_copies(layer):
        moved = copy.deepcopy(layer).to(torch.float16)
        assert moved.weight.decode_copy is None and layer.weight.decode_copy is not None


@needs_kernel
def test_weights_that_the_kernel_cannot_take_get_no_copy() -> None:
    refused = [packed(50, 64), packed(32, 96), packed(format="int8")]
    with decode_copies(nn.ModuleList(refused)) as taken:
        assert taken == 0 and not any(weight.decode_copy for weight in refused)


def test_int8_is_multiplied_without_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = QuantizedLinear(packed(format="int8")), unpackings(monkeypatch)
    x = torch.randn(2, 3, 128).bfloat16()
    with torch.no_grad():
        y = layer(x[..., :])
        strided = layer(torch.randn(3, 256).bfloat16()[:, ::2])
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert not seen
    assert y.shape == (2, 3, 96) and strided.shape == (3, 96)
    plain = F.linear(x, layer.weight.dequantize(torch.bfloat16))
    assert error(y.flatten(0, 1), x.flatten(0, 1), layer.weight) < 1.1 * error(
        plain.flatten(0, 1), x.flatten(0, 1), layer.weight
    )


@pytest.mark.parametrize("shape", [(7, 13), (50, 64), (16, 32)])
def test_int8_of_other_shapes_is_unpacked(shape: tuple[int, int]) -> None:
    weight = packed(*shape, format="int8")
    x = torch.randn(2, shape[1]).bfloat16()
    assert weight.few_rows_product(x) is None
    torch.testing.assert_close(QuantizedLinear(weight)(x), F.linear(x, weight.dequantize(torch.bfloat16)))


@pytest.mark.parametrize("double_quant", [True, False])
def test_accelerators_multiply_codes_as_they_are(double_quant: bool) -> None:
    weight = packed(double_quant=double_quant)
    x = torch.randn(2, 128)
    torch.testing.assert_close(packed_product(weight, x), F.linear(x, weight.dequantize(torch.float32)))
    with accelerator_pretended():
        assert weight.few_rows_product(x) is not None
        assert weight.few_rows_product(torch.randn(FEW_ROWS, 128)) is None
    assert weight.few_rows_product(x) is None


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [True, False])
def test_product_on_an_accelerator(double_quant: bool) -> None:
    layer = QuantizedLinear(packed(double_quant=double_quant)).cuda()
    x = torch.randn(1, 128, device="cuda").bfloat16()
    y = layer(x)
    assert error(y, x, layer.weight) < 5e-3


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_now_are_added(adapter_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed()
    x, bias = torch.randn(2, 3, 128).bfloat16(), torch.randn(96)
    a, b = torch.randn(4, 128).to(adapter_dtype), torch.randn(96, 4).to(adapter_dtype)

    def relative_error() -> float:
        y = lora_linear.adapted_linear(x, weight, bias, a, b, scaling=0.5)
        exact = x.float() @ (weight.dequantize(torch.float32) + 0.5 * b.float() @ a.float()).T + bias
        return float((y.float() - exact).norm() / exact.norm())

    first = relative_error()
    b.data.mul_(-3)  # raises no version counter
    assert relative_error() < 4e-3
    b.data.div_(-3)
    monkeypatch.setattr(lora_linear, "SHORT_PROMPT", 0)
    assert first < 1.1 * relative_error() < 5e-3  # that of training


@needs_kernel
def test_the_library_is_called_as_its_op_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed()
    copied, x = repacked(weight), torch.randn(3, 256).bfloat16()
    assert kernels._found_function("gemv_4bit_inference_cpu_nf4_bf16", "nnnppppnnn") is not None
    for rows in (x[:, :128], x[:, ::2]):  # strided rows, and values that are not side by side
        direct = kernels.copy_product(rows, copied, "nf4", 64)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_found_function", lambda name, arguments: None)
            assert torch.equal(kernels.copy_product(rows.contiguous(), copied, "nf4", 64), direct)
