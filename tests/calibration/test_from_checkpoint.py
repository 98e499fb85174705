"""Tests of calibrated folders: with transformers and bitsandbytes, as the base of adapters, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_adapter_, load_quantized, save_adapter
from qlora_lite.calibration import calibrate, calibrated_model
from qlora_lite.checkpoints.base_identity import BASE_FILE, check_trained_on_checkpoint
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export import save_quantized
from qlora_lite.export.companion_files import CALIBRATION_FILE
from qlora_lite.quantization.kernels import block_absmax
from qlora_lite.quantization.layers import QuantizedLinear

TOKENS = torch.arange(12).view(2, 6)
Rows = Callable[..., list[dict[str, torch.Tensor]]]


def packed_layers(model: Any) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def test_transformers_and_bitsandbytes_give_the_same_logits(calibrated: tuple[Path, Any]) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = calibrated
    ours, theirs = load_quantized(folder), AutoModelForCausalLM.from_pretrained(folder)
    theirs.train()  # in eval mode its layers re-pack themselves and round their statistics; it has no dropout
    assert torch.equal(theirs(TOKENS).logits, ours(TOKENS).logits)
    absmax = torch.cat([block_absmax(m.weight, 0, m.weight.absmax.numel()) for m in packed_layers(ours).values()])
    assert 0.2 < (absmax < 0).float().mean() < 0.8  # bitsandbytes multiplies by them as they are


def test_it_is_nearer_to_the_full_model_than_rounding(tiny_folder: Path, calibrated: tuple[Path, Any]) -> None:
    """The figures of the report, which come from blocks run one by one, are those of whole models."""
    folder, report = calibrated
    assert len(report.layers) == 14 and not report.rounded
    assert all(errors.calibrated < 0.7 * errors.rounded for errors in report.layers.values())
    assert report.divergences()["calibrated"] < 0.5 * report.divergences()["rounded"]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 100, (4, 48), generator=generator)
    bases = {
        "16-bit": load_quantized(tiny_folder, QuantConfig(format="none")),
        "rounded": load_quantized(tiny_folder),
        "calibrated": load_quantized(folder),
    }
    for name, model in bases.items():
        with torch.no_grad():
            logits = model(ids).logits[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        assert report.perplexities()[name] == pytest.approx(float(loss.exp()), rel=1e-3)


def test_the_files_have_the_bytes_of_rounded_ones_and_a_report(
    tiny_folder: Path, calibrated: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, report = calibrated
    save_quantized(load_quantized(tiny_folder), tmp_path / "rounded")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "rounded")]
    assert sizes[0] <= sizes[1]  # 0.0 takes fewer digits than another offset of the nested statistics
    noted = json.loads((folder / CALIBRATION_FILE).read_text())
    assert noted == json.loads(json.dumps(report.to_json())) and noted["tokens"] == 288
    again = load_quantized(folder)
    save_quantized(again, tmp_path / "again")
    assert (tmp_path / "again" / CALIBRATION_FILE).read_bytes() == (folder / CALIBRATION_FILE).read_bytes()
    assert load_quantized(tmp_path / "again").checkpoint_base == again.checkpoint_base
    export_merged(again, tmp_path / "plain")
    assert not (tmp_path / "plain" / CALIBRATION_FILE).exists()
    plain = load_quantized(tmp_path / "plain", QuantConfig(format="none"), dtype=torch.float16)
    name = "model.layers.1.mlp.up_proj"
    held = again.get_submodule(name).weight.dequantize(torch.float16)
    assert torch.equal(plain.get_submodule(name).weight, held)


def test_an_adapter_belongs_to_its_calibration(
    tiny_folder: Path, calibrated: tuple[Path, Any], random_rows: Rows, tmp_path: Path
) -> None:
    folder, _ = calibrated
    calibrate(tiny_folder, tmp_path / "base", random_rows(2, 40, 100, seed=9))
    bases = {"calibrated": folder, "rounded": tiny_folder, "other": tmp_path / "base"}
    for name, path in bases.items():
        model = load_quantized(path)
        add_lora_(model, LoraConfig(2, target_modules=["q_proj"]))
        save_adapter(model, tmp_path / name)
    for trained in bases:
        for given, path in bases.items():
            if trained == given:
                load_adapter_(load_quantized(path), tmp_path / trained)
                assert check_trained_on_checkpoint(tmp_path / trained, path) == ["sizes", "weights"]
                continue
            with pytest.raises(CheckpointError, match=r"was trained on weights packed (by rounding|with calibration)"):
                load_adapter_(load_quantized(path), tmp_path / trained)
            load_adapter_(load_quantized(path), tmp_path / trained, any_base=True)
    assert "calibration" not in json.loads((tmp_path / "rounded" / BASE_FILE).read_text())
    (tmp_path / "calibrated" / BASE_FILE).write_text(
        (tmp_path / "rounded" / BASE_FILE).read_text().replace('"version": 1', '"version": 1, "calibration": "x"')
    )
    with pytest.raises(CheckpointError, match="calibration should be a SHA-256 in hex; got 'x'"):
        load_adapter_(load_quantized(folder), tmp_path / "calibrated")


def test_it_is_the_same_in_each_run(tiny_folder: Path, calibrated: tuple[Path, Any], random_rows: Rows) -> None:
    folder, report = calibrated
    again = calibrated_model(tiny_folder, random_rows(6, 48, 100))
    before = load_quantized(folder).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    assert again.calibration.data_sha256 == report.data_sha256 and again.calibration.held_out is None


def test_padding_changes_nothing(tiny_folder: Path, random_rows: Rows) -> None:
    batch = random_rows(2, 30, 100)[0]
    ids = torch.nn.functional.pad(batch["input_ids"], (0, 5), value=1)
    mask = (torch.arange(35) < 30).long().repeat(2, 1)
    one, other = (
        calibrated_model(tiny_folder, [text], dtype=torch.float32)
        for text in (batch, {"input_ids": ids, "attention_mask": mask})
    )
    assert other.calibration.tokens == one.calibration.tokens == 60
    for name, errors in one.calibration.layers.items():
        assert other.calibration.layers[name].calibrated == pytest.approx(errors.calibrated, rel=0.05)


def test_what_cannot_be_calibrated_is_refused(
    tiny_folder: Path, calibrated: tuple[Path, Any], random_rows: Rows, tmp_path: Path
) -> None:
    text = random_rows(2, 16, 100)
    for config in (QuantConfig(format="int8"), QuantConfig(format="none")):
        with pytest.raises(ConfigError, match=r"calibration chooses codes of nf4 or fp4 \(int8 rows lose almost noth"):
            calibrated_model(tiny_folder, text, config)
    with pytest.raises(CheckpointError, match="is packed already, and calibration needs the weights in full precision"):
        calibrated_model(calibrated[0], text)
    for wrong, said in (
        ([], "calibration needs at least one batch; got 0"),
        ([{"input_ids": torch.zeros(3)}], r"each batch needs input_ids of shape \(rows, tokens\).*; got \(3,\)"),
        ([{"labels": torch.zeros(3, 3)}], "each batch needs input_ids of shape .*; got None"),
        (random_rows(2, 16, 1000), "the model has 105; use its tokenizer"),
    ):
        with pytest.raises(ConfigError, match=said):
            calibrate(tiny_folder, tmp_path / "out", wrong)
    assert not (tmp_path / "out").exists()


def test_a_classifier_is_refused(small_model: Callable[..., Any], random_rows: Rows, tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    config = small_model("LlamaConfig").config
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="its task is sequence-classification, and only language models are"):
        calibrated_model(tmp_path / "model", random_rows(2, 16, 60))
