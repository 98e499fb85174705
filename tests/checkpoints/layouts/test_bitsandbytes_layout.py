"""Tests of packed weights in files: equal to the tensors that bitsandbytes saves, and errors for damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_lite.checkpoints.layouts import bitsandbytes_layout
from qlora_lite.checkpoints.layouts.bitsandbytes_layout import (
    SMALLEST_FP16_ABSMAX,
    STATE,
    bitsandbytes_tensors,
    int8_rows_recoverable,
    stored_int8_rows,
    stored_packed_weights,
)
from qlora_lite.checkpoints.safetensors_read import stored_tensors
from qlora_lite.checkpoints.safetensors_write import write_safetensors
from qlora_lite.errors import CheckpointError, QuantizationError
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.layouts import BLOCKSIZES
from qlora_lite.quantization.packed_weight import PackedWeight

CPU = torch.device("cpu")
SHAPES = st.tuples(st.integers(1, 90), st.integers(1, 130))
WIDE = st.sampled_from([torch.bfloat16, torch.float32])
FLOATS = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def as_state_dict(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    planned = bitsandbytes_tensors("x.weight", packed, dtype)
    return {name: next(iter(tensor.slices())) for name, tensor in planned.items()}


def read_back(path: Path) -> PackedWeight:
    found, _ = stored_packed_weights(stored_tensors(path))
    return found["x.weight"].load(CPU)


def same(one: PackedWeight, other: PackedWeight) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@given(SHAPES, st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCKSIZES), st.booleans(), WIDE)
def test_four_bits_are_named_and_laid_out_as_bitsandbytes_does_it_and_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    format: str,
    blocksize: int,
    double_quant: bool,
    dtype: torch.dtype,
) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = PackedWeight.of(weight, QuantConfig(format, blocksize, double_quant))
    codes, state = bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=format)
    theirs = {"x.weight": codes, **{f"x.weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    ours = as_state_dict(packed, dtype)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) and ours[name].dtype == value.dtype, name
    path = tmp_path_factory.mktemp("packed") / "x.safetensors"
    save_file(theirs, path)
    assert same(read_back(path), packed)


@given(SHAPES, WIDE)
def test_eight_bits_come_back(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    import bitsandbytes

    weight = torch.randn(shape).to(dtype)
    layer = bitsandbytes.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    theirs = {f"x.{name}": value.detach() for name, value in layer.to("cpu").state_dict().items()}
    packed = PackedWeight.of(weight, QuantConfig("int8"))
    ours = as_state_dict(packed)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())
    path = tmp_path_factory.mktemp("packed") / "x.safetensors"
    save_file(theirs, path)
    assert same(read_back(path), packed)


@given(st.tuples(st.integers(1, 20), st.integers(1, 300)), st.floats(1e-7, 1e3), FLOATS)
def test_codes_of_rows_come_back_from_unpacked_values(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int], size: float, dtype: torch.dtype
) -> None:
    weight = torch.randn(shape) * size
    weight[0] = 0
    packed = PackedWeight.of(weight, QuantConfig("int8"))
    assume(int8_rows_recoverable(packed.absmax, dtype))
    path = tmp_path_factory.mktemp("rows") / "x.safetensors"
    save_file({"w": packed.dequantize(dtype), "absmax": packed.absmax}, path)
    stored = stored_tensors(path)
    rows = stored_int8_rows({"w": stored["w"]}, {"w": stored["absmax"]})["w"]
    assert same(rows.load(CPU), packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_code_survives_sixteen_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    packed = PackedWeight((4096, 255), "int8")
    packed.packed.copy_(torch.arange(-127, 128, dtype=torch.int8))
    packed.absmax.copy_(torch.rand(4096).half())
    packed.absmax[:1024] *= 2**-14
    packed.absmax[0] = SMALLEST_FP16_ABSMAX * 1.01
    packed.absmax.copy_(torch.where(packed.absmax > SMALLEST_FP16_ABSMAX, packed.absmax, 1.0))
    assert int8_rows_recoverable(packed.absmax, dtype)
    save_file({"w": packed.dequantize(dtype), "absmax": packed.absmax}, tmp_path / "x.safetensors")
    stored = stored_tensors(tmp_path / "x.safetensors")
    assert same(stored_int8_rows({"w": stored["w"]}, {"w": stored["absmax"]})["w"].load(CPU), packed)


def test_rows_that_were_changed_since_are_found(tmp_path: Path) -> None:
    packed = PackedWeight.of(torch.randn(5, 9), QuantConfig("int8"))
    values = packed.dequantize(torch.bfloat16)
    values[3, 2] = 1.5 * packed.absmax[3] / 127
    save_file({"w": values, "codes": packed.packed, "absmax": packed.absmax}, tmp_path / "x.safetensors")
    stored = stored_tensors(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"w has other rows than .* was written for"):
        stored_int8_rows({"w": stored["w"]}, {"w": stored["absmax"]})["w"].load(CPU)
    for plain, name in (({}, "w"), ({"codes": stored["codes"]}, "codes"), ({"absmax": stored["absmax"]}, "absmax")):
        with pytest.raises(CheckpointError, match=f"no matching rows in the checkpoint for {name}"):
            stored_int8_rows(plain, {name: stored["absmax"]})


def test_codes_stored_as_another_dtype_are_the_same_bytes(tmp_path: Path) -> None:
    weight = torch.randn(8, 64)
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16)
    tensors = {f"x.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file({"x.weight": codes, **tensors}, tmp_path / "x.safetensors")
    assert codes.dtype == torch.bfloat16
    assert same(read_back(tmp_path / "x.safetensors"), PackedWeight.of(weight, QuantConfig(double_quant=False)))


def test_neither_slices_nor_strangers_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedWeight.of(torch.randn(40, 64), QuantConfig())
    tensors = as_state_dict(packed) | {"other.weight": torch.ones(3, 3)}
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr(bitsandbytes_layout, "READ_BYTES", 1)
    found, statistics = stored_packed_weights(stored_tensors(tmp_path / "x.safetensors"))
    assert same(found["x.weight"].load(CPU), packed)
    assert statistics == tensors.keys() - {"x.weight", "other.weight"}


def facts(**changed: object) -> Callable[[dict[str, Tensor]], None]:
    """Writes other facts into the JSON object."""

    def change(tensors: dict[str, Tensor]) -> None:
        key = f"x.weight.{STATE}nf4"
        said = json.loads(bytes(tensors[key].numpy())) | changed
        tensors[key] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return change


def lost(part: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(part)] and None


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


STATE_KEY = f"x.weight.{STATE}nf4"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lost(".absmax"), r"x\.weight misses absmax$"),
        (lost("nested_absmax"), r"x\.weight misses nested_absmax$"),
        (lost("quant_map"), r"x\.weight misses nested_quant_map$"),
        (lost(STATE + "nf4"), r"x\.weight should have one .*; got none"),
        (lost("x.weight"), r"x\.weight misses the weight itself"),
        (put(f"x.weight.{STATE}fp4", torch.zeros(2, dtype=torch.uint8)), "should have one"),
        (put(STATE_KEY, torch.tensor(list(b"{nf4"), dtype=torch.uint8)), "is not JSON"),
        (put(STATE_KEY, torch.tensor([255, 254], dtype=torch.uint8)), "is not JSON"),
        (put(STATE_KEY, torch.tensor(list(b"[1]"), dtype=torch.uint8)), "should be a JSON object; got a list"),
        (facts(quant_type="fp4"), "has quant_type 'fp4'"),
        (facts(blocksize=96, shape=[40]), r"has blocksize 96, shape \[40\]"),
        (facts(shape=[40, 128]), r"x\.weight has 1,280 bytes, nf4 of \(40, 128\) needs 2,560"),
        (facts(blocksize=128), r"absmax is \(40,\) of torch\.uint8, 20 of torch\.uint8 are needed"),
        (facts(nested_blocksize=64), "has nested_blocksize 64"),
        (facts(nested_offset=None), "has nested_offset None"),
        (put("x.weight.absmax", torch.ones(40)), r"absmax is \(40,\) of torch\.float32"),
        (put("x.weight.quant_map", torch.arange(16.0)), r"quant_map is not the table of nf4"),
        (put("x.weight", torch.zeros(1279, 1, dtype=torch.uint8)), "has 1,279 bytes"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str) -> None:
    tensors = as_state_dict(PackedWeight.of(torch.randn(40, 64), QuantConfig()))
    damage(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        stored_packed_weights(stored_tensors(tmp_path / "x.safetensors"))


def test_damage_to_eight_bits_is_named_and_all_is_listed_at_once(tmp_path: Path) -> None:
    tensors = as_state_dict(PackedWeight.of(torch.randn(6, 8), QuantConfig("int8")))
    column = tensors | {"x.weight_format": torch.tensor(2, dtype=torch.uint8)}
    save_file(column, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.weight is laid out for one kind of accelerator \(weight_format 2\)"):
        stored_packed_weights(stored_tensors(tmp_path / "x.safetensors"))
    older = {name: value for name, value in tensors.items() if name != "x.weight_format"}
    save_file(older, tmp_path / "x.safetensors")
    assert read_back(tmp_path / "x.safetensors").format == "int8"
    save_file(
        {"x.SCB": torch.ones(5), "x.weight": tensors["x.weight"], "y.SCB": torch.ones(1)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"x\.SCB is \(5,\) .*; y\.weight misses the weight itself"):
        stored_packed_weights(stored_tensors(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("config", [QuantConfig(double_quant=False), QuantConfig("int8"), QuantConfig()])
def test_statistics_that_are_not_finite_are_named(tmp_path: Path, config: QuantConfig) -> None:
    packed = PackedWeight.of(torch.randn(40, 64), config)
    (packed.nested_absmax if packed.double_quant else packed.absmax)[0] = torch.nan
    write_safetensors(tmp_path / "x.safetensors", bitsandbytes_tensors("x.weight", packed, torch.float32))
    assert load_file(tmp_path / "x.safetensors").keys() == as_state_dict(packed).keys()
    with pytest.raises(QuantizationError, match=r"(absmax|SCB) holds nan at index \(0,\)"):
        read_back(tmp_path / "x.safetensors")
