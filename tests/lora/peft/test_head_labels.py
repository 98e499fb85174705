"""Tests of the names of a classifier's labels on their way through adapter, reload and merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_adapter_, load_quantized, save_adapter
from qlora_lite.checkpoints.files import read_json
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.lora.peft.options import LABELS_FILE, adapter_task, labels_of_adapter, read_labels

TASK, NAMES = "sequence-classification", ["no", "yes", "perhaps"]
TOKENS = torch.arange(10, 26).view(2, 8)
PLAIN = QuantConfig(format="none")


@pytest.fixture(scope="module")
def adapted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A classifier with an adapter and a head that changed, and their folder."""
    model: Any = load_quantized(tiny_folder, task=TASK, labels=NAMES)
    model.config.pad_token_id, model.config.problem_type = 1, "single_label_classification"
    add_lora_(model, LoraConfig(rank=2))
    torch.manual_seed(0)
    with torch.no_grad():
        for value in adapter_parameters(model).values():
            value.add_(torch.randn_like(value), alpha=0.1)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(model, folder)
    return model, folder


def test_labels_are_saved_beside_the_adapter_and_set_when_it_is_loaded(
    adapted: tuple[Any, Path], tiny_folder: Path
) -> None:
    model, folder = adapted
    assert adapter_task(folder) is not None and labels_of_adapter(folder) == NAMES
    assert read_json(folder / LABELS_FILE)["pad_token_id"] == 1
    again: Any = load_quantized(tiny_folder, task=TASK, labels=3)
    load_adapter_(again, folder)
    assert again.config.id2label == dict(enumerate(NAMES)) and again.config.label2id["perhaps"] == 2
    assert again.config.pad_token_id == 1 and again.config.problem_type == "single_label_classification"
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_exports_are_plain_classifiers_from_memory_and_from_disk(
    adapted: tuple[Any, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    model, folder = adapted
    export_merged(model, tmp_path / "one", torch.float32)
    merge_checkpoint(tiny_folder, folder, tmp_path / "other", dtype=torch.float32)
    files = [tmp_path / name / "model.safetensors" for name in ("one", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for name in ("one", "other"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["LlamaForSequenceClassification"] and config["pad_token_id"] == 1
        assert list(config["id2label"].values()) == NAMES and config["label2id"] == {"no": 0, "yes": 1, "perhaps": 2}
    plain: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "other")
    ours: Any = load_quantized(tmp_path / "one", PLAIN, dtype=torch.float32)
    assert ours.load_report.created == [] and torch.equal(ours.score.weight, plain.score.weight)
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS).logits, plain(TOKENS).logits)
        torch.testing.assert_close(model(TOKENS).logits.float(), plain(TOKENS).logits, rtol=0.02, atol=0.02)
    with pytest.raises(ConfigError, match="verify compares the logits of next tokens, and the task of a LlamaForSequ"):
        export_merged(model, tmp_path / "third", verify=[])
    with pytest.raises(ConfigError, match="export it without, and compare its outputs in transformers"):
        merge_checkpoint(tiny_folder, folder, tmp_path / "third", verify=[])


def test_an_adapter_of_peft_has_as_many_labels_as_its_head(
    adapted: tuple[Any, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    import peft

    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=3), adapted[1]
    )
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_labels(tmp_path / "theirs") is None and labels_of_adapter(tmp_path / "theirs") == 3
    merge_checkpoint(tiny_folder, tmp_path / "theirs", tmp_path / "merged", dtype=torch.float32)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "merged").id2label[2] == "LABEL_2"


def test_the_adapter_of_a_classifier_needs_a_classifier(adapted: tuple[Any, Path], tiny_folder: Path) -> None:
    says = r"the adapter of a classifier \(task_type SEQ_CLS\), and the model is a LlamaForCausalLM; load the base with"
    with pytest.raises(CheckpointError, match=f"{says} task='sequence-classification' and labels=\\['no', 'yes'"):
        load_adapter_(load_quantized(tiny_folder), adapted[1])


def test_damaged_labels_are_refused(tmp_path: Path) -> None:
    for wrong in ('{"id2label": []}', '{"id2label": {"1": "a"}}', '{"id2label": {"0": 3}}'):
        (tmp_path / LABELS_FILE).write_text(wrong)
        with pytest.raises(CheckpointError, match=r"labels.json should have names by their numbers from 0"):
            read_labels(tmp_path)
