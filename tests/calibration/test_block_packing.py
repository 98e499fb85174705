"""Tests of packing block by block: families of models, and what is packed by rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.calibration import block_packing, calibrated_model
from qlora_lite.calibration.layer_inputs import noted_inputs

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
FAMILIES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("GPT2Config", {"hidden_size": 64}, set()),  # transposed
    ("Phi3Config", SIZES, set()),  # fused projections
    ("MixtralConfig", SIZES, {"a stack of experts' matrices"}),
    ("LlamaConfig", {**SIZES, "intermediate_size": 96}, {"96 columns are not a multiple of the block size 64"}),
]


@pytest.mark.parametrize(("family", "sizes", "reasons"), FAMILIES)
def test_layers_are_calibrated_or_rounded_as_by_loading(
    small_model: Callable[..., Any],
    random_rows: Callable[..., Any],
    tmp_path: Path,
    family: str,
    sizes: dict[str, Any],
    reasons: set[str],
) -> None:
    small_model(family, **sizes).save_pretrained(tmp_path / "model")
    rounded = load_quantized(tmp_path / "model").state_dict()
    text, others = random_rows(6, 32, 64), random_rows(4, 32, 64, seed=1)
    model = calibrated_model(tmp_path / "model", text, QuantConfig(), held_out=others)
    report = model.calibration
    assert set(report.rounded.values()) == reasons
    assert report.layers and all(errors.calibrated < errors.rounded for errors in report.layers.values())
    assert report.divergences()["calibrated"] < report.divergences()["rounded"]
    held = model.state_dict()
    assert held.keys() == rounded.keys()
    same = {name for name, value in held.items() if torch.equal(value, rounded[name])}
    calibrated = {name for name in held if name.endswith(".packed") and name not in same}
    assert calibrated == {f"{name}.weight.packed" for name in report.layers}
    assert model.dtype == torch.bfloat16 and not any(p.requires_grad for p in model.parameters())


def test_an_embedding_in_rows_and_a_packed_head_are_rounded(tiny_folder: Path, random_rows: Callable[..., Any]) -> None:
    text = random_rows(4, 32, 100)
    model = calibrated_model(tiny_folder, text, QuantConfig(embedding_format="int8"), held_out=text)
    assert model.calibration.rounded == {"model.embed_tokens": "outside of the blocks that text passes through"}
    rounded = load_quantized(tiny_folder, QuantConfig(embedding_format="int8"))
    assert torch.equal(model.model.embed_tokens.weight.packed, rounded.model.embed_tokens.weight.packed)
    assert len(model.calibration.layers) == 14


def test_inputs_are_those_that_layers_get_in_the_finished_model(
    tiny_folder: Path, random_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer was packed for the inputs that it gets behind all packed layers before it, and in the 16-bit model."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    own = block_packing.pack_with_feedback

    def noting(weight: Any, products: Any, order: Any, config: Any, format: str, name: str) -> Any:
        seen[name.removesuffix(".weight")] = products.hessian.clone(), products.drift.clone()
        return own(weight, products, order, config, format, name)

    monkeypatch.setattr(block_packing, "pack_with_feedback", noting)
    text = random_rows(4, 32, 100)
    models = calibrated_model(tiny_folder, text), load_quantized(tiny_folder, QuantConfig(format="none"))
    inputs: list[dict[str, list[torch.Tensor]]] = []
    for model in models:
        with noted_inputs({name: model.get_submodule(name) for name in seen}) as noted, torch.no_grad():
            for batch in text:
                model(**batch)
        inputs.append(noted)
    assert len(seen) == 14
    for name, (hessian, drift) in seen.items():
        packed, plain = (torch.cat([x.flatten(0, 1).float() for x in noted[name]]) for noted in inputs)
        torch.testing.assert_close(hessian, packed.T @ packed, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(drift, (plain - packed).T @ packed, rtol=1e-4, atol=1e-4)
    undrifted = {name for name, (_, drift) in seen.items() if not drift.any()}
    assert undrifted == {f"model.layers.0.self_attn.{projection}_proj" for projection in "qkv"}


def test_a_vision_tower_is_left_as_it_is(tiny_vision_folder: Path, random_rows: Callable[..., Any]) -> None:
    rounded = load_quantized(tiny_vision_folder)
    model = calibrated_model(tiny_vision_folder, random_rows(4, 16, 100), held_out=random_rows(2, 16, 100, seed=1))
    before = rounded.state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".text_model." in name for name in changed)
    assert all(".text_model." in name for name in model.calibration.layers)


def test_a_layer_that_some_tokens_miss_behind_packed_layers_is_rounded(
    tiny_folder: Path, random_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = block_packing.input_of

    def missing(layer: Any, run: Callable[[], object]) -> torch.Tensor | None:
        value = own(layer, run)
        return value if value is None or layer.in_features == 64 else value[:, :-1]  # of down_proj

    monkeypatch.setattr(block_packing, "input_of", missing)
    model = calibrated_model(tiny_folder, random_rows(4, 32, 100))
    reasons = {f"model.layers.{number}.mlp.down_proj": block_packing.INCOMPLETE for number in range(2)}
    assert model.calibration.rounded == reasons and len(model.calibration.layers) == 12
