"""Tests of packing block by block: families of models, and what is packed by rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.calibration import calibrated_model

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
