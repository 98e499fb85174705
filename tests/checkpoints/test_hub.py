"""Tests of reading configs, tokenizers and folders through transformers, and of the errors when that fails."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_lite.architecture import output_head, tied_names, tied_pairs
from qlora_lite.checkpoints.hub import (
    checkpoint_folder,
    empty_model,
    load_tokenizer,
    model_folder,
    quantization_config,
    read_config,
    read_generation_config,
    save_generation_config,
)
from qlora_lite.errors import CheckpointError


def test_a_model_is_built_without_bytes(tiny_folder: Path) -> None:
    model = empty_model(read_config(tiny_folder), torch.bfloat16)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert output_head(model) is model.lm_head


def test_a_model_of_the_hub_leads_to_its_own_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    held = tmp_path / "models--some--model"
    for revision in ("1" * 40, "2" * 40):
        (held / "snapshots" / revision).mkdir(parents=True)
        (held / "snapshots" / revision / "config.json").write_text("{}")
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text("2" * 40)
    for commit, found in (("1" * 40, "1" * 40), (None, "2" * 40)):
        model = SimpleNamespace(config=SimpleNamespace(_name_or_path="some/model", _commit_hash=commit))
        folder = model_folder(model)
        assert folder is not None and folder.name == found
    for gone in ("some/model", "/gone/model"):
        model = SimpleNamespace(config=SimpleNamespace(_name_or_path=gone, _commit_hash="3" * 40))
        with pytest.raises(CheckpointError, match=f"^the model came from {gone}, which does not exist any more"):
            model_folder(model)


def test_wrong_places_get_one_sentence(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        checkpoint_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"^C:\\model does not exist$"):
        checkpoint_folder("C:\\model")
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint_folder(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"cannot be fetched: HF_HUB_OFFLINE is set, and keeps the client off the net"
    ):
        checkpoint_folder("nobody/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(CheckpointError, match="no config that transformers knows"):
        read_config(tmp_path)
    assert load_tokenizer(tiny_folder).pad_token_id is not None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vocab_size": "x"}, "no config that transformers knows: Validation error for field 'vocab_size': TypeError"),
        ({"num_attention_heads": 0}, "no config that transformers knows: .*zero"),
        ({"hidden_size": -4}, "no model can be built for model type 'llama': .*negative"),
        ({"pad_token_id": 10**9}, "no model can be built for model type 'llama': Padding_idx"),
    ],
)
def test_a_config_that_no_model_has_gets_one_sentence(
    tiny_folder: Path, tmp_path: Path, wrong: dict[str, object], message: str
) -> None:
    config = json.loads((tiny_folder / "config.json").read_text()) | wrong
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        empty_model(read_config(tmp_path), torch.bfloat16)


def test_how_a_folder_is_packed_is_read_and_kept_out_of_the_model(tiny_folder: Path, tmp_path: Path) -> None:
    assert quantization_config(tmp_path) is quantization_config(tiny_folder) is None
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = json.loads((tiny_folder / "config.json").read_text()) | {"quantization_config": said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantization_config(tmp_path) == said
    assert "quantization_config" not in read_config(tmp_path).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert quantization_config(tmp_path) is None
    assert "quantization_config" not in read_config(tmp_path).to_dict()


def test_tied_names(tiny_folder: Path) -> None:
    model = empty_model(read_config(tiny_folder), torch.bfloat16)
    assert tied_pairs(model) == [("lm_head.weight", "model.embed_tokens.weight")]
    assert tied_names(model) == {"lm_head.weight"}


def test_a_generation_config_that_transformers_does_not_write_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) is None
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    config = read_generation_config(tmp_path)
    assert config.temperature == 0.5
    config.early_stopping = "x"
    with pytest.raises(CheckpointError, match=r"the generation config cannot be saved: .*early_stopping"):
        save_generation_config(SimpleNamespace(generation_config=config), tmp_path)
    save_generation_config(SimpleNamespace(), tmp_path)  # without one, nothing is written
