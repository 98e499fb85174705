"""Tests of renamed and split checkpoints against the models and the conversion operations of transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.checkpoints import pack_on_load
from qlora_lite.checkpoints.conversion import OPERATIONS, Conversion, converted_tensors
from qlora_lite.checkpoints.lazy_tensors import read_slices
from qlora_lite.checkpoints.safetensors_read import StoredTensor, stored_tensors
from qlora_lite.errors import CheckpointError, QuantizationError

TOKENS = torch.arange(14).view(2, 7)
EXPERT = "model.layers.1.block_sparse_moe.experts.11.w{}.weight"


@pytest.fixture(scope="module")
def saved(small_model: Callable[..., Any]) -> Callable[..., Any]:
    """A random model of transformers, saved under the names that its checkpoints have on the hub."""

    def save(family: str, folder: Path) -> Any:
        model = small_model(family, num_experts=12, num_local_experts=12)
        model.save_pretrained(folder)
        return model

    return save


@pytest.fixture(scope="module")
def mixtral(saved: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    saved("MixtralConfig", folder)
    return folder


@pytest.mark.parametrize(
    "family", ["GPTNeoXConfig", "MixtralConfig", "Qwen3MoeConfig", "GraniteMoeConfig", "NemotronHConfig", "Phi3Config"]
)
def test_families_load_as_transformers_loads_them(family: str, tmp_path: Path, saved: Callable[..., Any]) -> None:
    theirs = saved(family, tmp_path)
    ours = load_quantized(tmp_path, QuantConfig(format="none"), dtype=torch.float32)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)


def test_the_checkpoint_of_a_model_without_its_head(tmp_path: Path, saved: Callable[..., Any]) -> None:
    theirs = saved("GPT2Config", tmp_path / "whole")
    theirs.transformer.save_pretrained(tmp_path / "body")
    names = load_file(tmp_path / "body" / "model.safetensors").keys()
    assert "h.0.attn.c_attn.weight" in names and not any(name.startswith("transformer.") for name in names)
    plain = QuantConfig(format="none")
    ours = load_quantized(tmp_path / "body", plain, dtype=torch.float32, task="causal-lm")
    assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
    body = load_quantized(tmp_path / "body", plain, dtype=torch.float32)
    assert type(body).__name__ == "GPT2Model"
    assert torch.equal(body(TOKENS).last_hidden_state, theirs.transformer(TOKENS).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sources_of_every_float_give_the_model_that_transformers_loads(
    mixtral: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    folder = changed(mixtral, tmp_path, {n: t.to(dtype) for n, t in load_file(mixtral / "model.safetensors").items()})
    ours = load_quantized(folder, QuantConfig(format="none"), dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())


def changed(folder: Path, target: Path, tensors: dict[str, Tensor]) -> Path:
    shutil.copytree(folder, target / "changed", dirs_exist_ok=True)
    save_file(tensors, target / "changed" / "model.safetensors", metadata={"format": "pt"})
    return target / "changed"


def test_no_more_than_a_slice_is_read_at_once(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest: dict[str, int] = {}
    read = StoredTensor._read

    def noted(stored: StoredTensor, offset: int, shape: tuple[int, ...]) -> Tensor:
        if len(shape) > 1:  # samples of values are read as if there were one dimension
            largest[stored.name] = max(largest.get(stored.name, 0), shape[0])
        return read(stored, offset, shape)

    monkeypatch.setattr(StoredTensor, "_read", noted)
    monkeypatch.setattr(pack_on_load, "READ_BYTES", 1)
    load_quantized(mixtral, QuantConfig())
    assert max(rows for name, rows in largest.items() if ".experts." in name) == 4  # 64 values, a block, in 4 rows


def test_what_does_not_fit_is_listed_at_once(mixtral: Path, tmp_path: Path) -> None:
    tensors = load_file(mixtral / "model.safetensors")
    lost = tensors.pop(EXPERT.format(2))
    tensors[EXPERT.format(1)] = torch.zeros(3, 32)
    tensors["model.stranger"] = lost
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError) as raised:
        load_quantized(changed(mixtral, tmp_path, tensors))
    for part in (
        "1 tensors are missing: model.norm.weight",
        "1 tensors belong to no module: model.stranger",
        "model.layers.1.mlp.experts.down_proj is (11, 32, 48), the model has (12, 32, 48)",
        "model.layers.1.mlp.experts.gate_up_proj is made of tensors whose shapes do not fit together",
    ):
        assert part in str(raised.value)


def test_a_bad_value_is_named_where_it_lies(mixtral: Path, tmp_path: Path) -> None:
    tensors = load_file(mixtral / "model.safetensors")
    tensors[EXPERT.format(2)][3, 5] = float("nan")
    tensors[EXPERT.format(3)][4, 6] = float("inf")
    with pytest.raises(QuantizationError) as raised:
        load_quantized(changed(mixtral, tmp_path, tensors))
    assert f"{EXPERT.format(2)} holds nan at index (3, 5)" in str(raised.value)
    assert "model.layers.1.mlp.experts.gate_up_proj[11] holds inf at index (52, 6)" in str(raised.value)


def test_a_tensor_under_two_names_is_refused(mixtral: Path, tmp_path: Path) -> None:
    tensors = load_file(mixtral / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(12, 32)
    with pytest.raises(
        CheckpointError, match=r"gate\.weight is in the checkpoint more than once: .*block_sparse_moe\.gate"
    ):
        load_quantized(changed(mixtral, tmp_path, tensors))


def test_an_operation_that_is_not_known_is_named(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import PermuteForRope, WeightConverter

    rule = WeightConverter("self_attn.q_proj", "self_attn.q_proj", operations=[PermuteForRope()])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [rule])
    files = {name: stored for name, stored in stored_tensors(mixtral / "model.safetensors").items() if "q_proj" in name}
    model = load_quantized_empty(mixtral)
    found = converted_tensors(model, dict.fromkeys(files, (32, 32)), files)
    assert found.failed == set(files) and not found.tensors
    assert "transformers makes it by PermuteForRope, which is not supported" in found.problems[0]


def load_quantized_empty(folder: Path) -> Any:
    from qlora_lite.checkpoints.hub import empty_model, read_config

    return empty_model(read_config(folder), torch.float32)


def made(folder: Path, rule: Any, tensors: dict[str, list[Tensor]], shapes: dict[str, Any]) -> dict[str, Tensor]:
    """What our operations make, by target pattern, of tensors by source pattern."""
    from qlora_lite.checkpoints import conversion

    flat = {f"{number}.{index}": t for number, ts in enumerate(tensors.values()) for index, t in enumerate(ts)}
    save_file({name: tensor.clone() for name, tensor in flat.items()}, folder / "x.safetensors")
    sources = {key: [f"{n}.{i}" for i in range(len(ts))] for n, (key, ts) in enumerate(tensors.items())}
    patterns = (tuple(rule.source_patterns), tuple(rule.target_patterns), tuple(rule.operations))
    plan = Conversion(rule.target_patterns[0], sources, *patterns)
    views = conversion._made(plan, stored_tensors(folder / "x.safetensors"), shapes)
    return {name: torch.cat([rows for _, rows in read_slices(view, 64)]) for name, view in views.items()}


@given(rows=st.integers(1, 3), columns=st.integers(1, 5), count=st.integers(1, 4))
def test_each_operation_makes_what_transformers_makes(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, count: int
) -> None:
    from transformers import core_model_loading as theirs

    def matrices() -> list[Tensor]:
        return [torch.randn(2 * rows, columns) for _ in range(count)]

    merge, whole = theirs.MergeModulelist(dim=0), [torch.randn(2 * rows, columns)]
    rules: list[tuple[Any, dict[str, list[Tensor]]]] = [
        (theirs.WeightConverter(["e.*.a", "e.*.b"], "e.ab", [merge, theirs.Concatenate(dim=1)]), {}),
        (theirs.WeightConverter(["e.*.a"], "e.a", [merge]), {}),
        (theirs.WeightConverter(["e.*.a"], "e.a", [merge, theirs.Transpose(1, 2)]), {}),
        (theirs.WeightConverter(["a", "b"], "ab", [theirs.Concatenate(dim=0)]), {"a": whole, "b": whole}),
        (theirs.WeightConverter("ab", ["a", "b"], [theirs.Chunk(dim=0)]), {"ab": whole}),
        (theirs.WeightConverter("a", "b", [theirs.Transpose(0, 1)]), {"a": whole}),
        (theirs.WeightConverter("a", "b", [theirs.Interleave(dim=0)]), {"a": whole}),
        (theirs.WeightConverter("a", "b", [theirs.Interleave(dim=0, inverse=True)]), {"a": whole}),
        (theirs.WeightConverter("ab", ["a", "b"], [theirs.Interleave(dim=0), theirs.Chunk(dim=0)]), {"ab": whole}),
        (theirs.WeightConverter("ab", ["a", "b"], [theirs.Split(dim=0)]), {"ab": [torch.randn(3 * rows, columns)]}),
    ]
    used = set()
    shapes = {"a": (rows, columns), "b": (2 * rows, columns)}
    model: Any = type("Model", (), {"get_parameter": lambda self, name: torch.empty(shapes[name])})()
    for rule, given_tensors in rules:
        tensors = given_tensors or {pattern: matrices() for pattern in rule.source_patterns}
        expected: Any = {pattern: list(several) for pattern, several in tensors.items()}
        for operation in rule.operations:
            used.add(type(operation).__name__)
            options = {"source_patterns": rule.source_patterns, "target_patterns": rule.target_patterns}
            expected = operation.convert(expected, **options, full_layer_name=rule.target_patterns[0], model=model)
        ours = made(tmp_path_factory.mktemp("rule"), rule, tensors, shapes)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert used == set(OPERATIONS)
