"""Tests of an adapter's model card: what it says, that its code runs, and that users' edits survive."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from qlora_lite.checkpoints.load import load_quantized
from qlora_lite.lora.adapters import add_lora_, lora_layers
from qlora_lite.lora.config import LoraConfig
from qlora_lite.lora.peft.card import TrainingRecord, adapter_card
from qlora_lite.lora.peft.save_load import save_adapter
from qlora_lite.quantization.config import QuantConfig

RECORD = TrainingRecord(steps=20, tokens=12345, learning_rate=2e-4, first_loss=3.25, last_loss=1.5)


@pytest.fixture
def adapted(tiny_folder: Path) -> Any:
    model = load_quantized(tiny_folder, QuantConfig("nf4"))
    add_lora_(model, LoraConfig(rank=4, alpha=8, use_rslora=True))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    return model


def test_it_says_what_the_adapter_is(adapted: Any, tiny_folder: Path, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path / "a", training=RECORD)
    card = ModelCard.load(tmp_path / "a" / "README.md")
    assert card.data.to_dict() == {
        "base_model": tiny_folder.name,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora-lite"],
    }
    assert str(tiny_folder.parent) not in card.text
    for line in (
        "| base packed as | nf4 |",
        "| rank | 4 |",
        "| alpha | 8",
        "| scaling | alpha / sqrt(rank) |",
        "| target_modules | down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj |",
        "| optimizer steps | 20 |",
        "| tokens, padding included | 12,345 |",
        "| peak learning rate | 0.0002 |",
        "| loss of the first step | 3.25 |",
    ):
        assert line in card.text
    assert "held-out" not in card.text and "modules_to_save" not in card.text
    save_adapter(adapted, tmp_path / "b")
    assert "## Training" not in (tmp_path / "b" / "README.md").read_text()


def test_its_code_loads_the_adapter(adapted: Any, tiny_folder: Path, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    tokens = torch.tensor([[5, 6, 7]])
    logits = []
    for block in blocks:
        names: dict[str, Any] = {}
        code = block.replace(f'"{tiny_folder.name}"', repr(str(tiny_folder)))
        exec(code.replace('"path/to/this/folder"', repr(str(tmp_path))), names)
        logits.append(names["model"](tokens).logits)
    torch.testing.assert_close(logits[0], adapted(tokens).logits)
    assert len(logits) == 2 and logits[1].shape == logits[0].shape


def test_a_user_s_card_is_kept_and_ours_is_renewed(adapted: Any, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path, training=TrainingRecord(1, 2, 0.5, 3.0, 2.5, (3.5, 2.75)))
    text = (tmp_path / "README.md").read_text()
    assert "| held-out loss before | 3.5 |\n| held-out loss after | 2.75 |" in text
    save_adapter(adapted, tmp_path, overwrite=True)
    assert "held-out" not in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    save_adapter(adapted, tmp_path, overwrite=True, training=RECORD)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_base_of_the_hub_is_named_by_its_id(adapted: Any, tmp_path: Path) -> None:
    adapted.config._name_or_path = f"{tmp_path}/models--org--tiny/snapshots/{'1' * 40}"
    save_adapter(adapted, tmp_path / "a")
    assert ModelCard.load(tmp_path / "a" / "README.md").data.base_model == "org/tiny"
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "org/tiny"


def test_a_base_that_loftq_packed_is_not_promised_to_peft(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig("nf4"))
    add_lora_(model, LoraConfig(rank=2, init_lora_weights="loftq:2", target_modules=["0.self_attn.k_proj"]))
    save_adapter(model, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "LoftQ packed the base" in text and "from peft" not in text and "base_model:" not in text


def test_a_classifier_is_loaded_as_one(tiny_folder: Path) -> None:
    from transformers import AutoConfig, LlamaForSequenceClassification

    with torch.device("meta"):
        model = LlamaForSequenceClassification(AutoConfig.from_pretrained(tiny_folder, num_labels=5))
    config = {"base_model_name_or_path": "org/base", "r": 2, "lora_alpha": 4}
    card = adapter_card(model, config, None)
    assert card.more == {"pipeline_tag": "text-classification"}
    assert 'QuantConfig(format="none"), task="sequence-classification", labels=5)' in card.body
    assert 'AutoModelForSequenceClassification.from_pretrained("org/base", num_labels=5)' in card.body
