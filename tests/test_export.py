"""Exports against transformers, and against the layers they come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_quantized
from qlora_lite.adapters import lora_layers
from qlora_lite.errors import CheckpointError, QuantizationError, TargetError
from qlora_lite.storage import TensorFiles

TOKENS = torch.arange(12).view(2, 6)


def trained(folder: Path, targets: Any = "all-linear", **quant: Any) -> Any:
    model = load_quantized(folder, QuantConfig(**quant), dtype=torch.float32)
    add_lora_(model, LoraConfig(rank=3, alpha=7, target_modules=targets))
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    return model.eval()


@pytest.mark.parametrize("quant", [{}, {"format": "int8", "embedding_format": "int8"}, {"format": "none"}])
def test_plain_transformers_gives_the_same_answers(tiny_folder: Path, tmp_path: Path, quant: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = trained(tiny_folder, **quant)
    export_merged(model, tmp_path / "out", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert not hasattr(plain.config, "quantization_config")
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", tiny_folder))
    assert ours.chat_template == theirs.chat_template and ours.get_vocab() == theirs.get_vocab()


def test_every_tensor_is_the_merged_one_whatever_the_shards(tiny_folder: Path, tmp_path: Path) -> None:
    model = trained(tiny_folder)
    export_merged(model, tmp_path / "one")
    files = export_merged(model, tmp_path / "many", max_shard_bytes=20_000)
    one, many = dict(TensorFiles(tmp_path / "one").items()), dict(TensorFiles(tmp_path / "many").items())
    assert len(files) > 1 and one.keys() == many.keys()
    assert all(torch.equal(tensor, many[name]) and tensor.dtype == torch.float16 for name, tensor in one.items())
    for name, layer in lora_layers(model).items():
        assert torch.equal(one[f"{name}.weight"], layer.effective_weight(torch.float16))


def test_overflow_is_named_and_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    model = trained(tiny_folder)
    with torch.no_grad():
        lora_layers(model)["model.layers.1.mlp.up_proj"].lora_B.fill_(1e9)
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight reaches .* use bfloat16"):
        export_merged(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    export_merged(model, tmp_path / "out", dtype=torch.bfloat16)


def test_full_folder_is_refused_and_overwritten_on_request(tiny_folder: Path, tmp_path: Path) -> None:
    model = trained(tiny_folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        export_merged(model, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
    with pytest.raises(CheckpointError, match="no checkpoint has, and they would be lost: mine"):
        export_merged(model, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "mine").rename(tmp_path / "out" / "model-00001-of-00002.safetensors")
    export_merged(model, tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_the_checkpoint_that_the_model_came_from_is_not_replaced(tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="would replace the input"):
        export_merged(trained(tiny_folder), tiny_folder.parent, overwrite=True)


def test_the_generation_config_and_the_tokenizer_travel(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "base")
    written = {"eos_token_id": [1, 4], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(written))
    monkeypatch.chdir(tmp_path)
    model = load_quantized("base")
    monkeypatch.chdir("/")
    export_merged(model, tmp_path / "out")
    exported = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: exported.get(name) for name in written} == written
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match="is not there any more"):
        export_merged(model, tmp_path / "again")


def test_weights_tied_by_hand_are_written_twice(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    untied = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_folder, tie_word_embeddings=False))
    untied.lm_head.weight = untied.model.embed_tokens.weight
    untied.config._name_or_path = ""
    export_merged(untied, tmp_path / "out", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, untied.lm_head.weight)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]])
def test_adapting_one_of_two_tied_weights_cannot_be_exported(
    tiny_folder: Path, tmp_path: Path, targets: list[str]
) -> None:
    with pytest.raises(TargetError, match="are one weight"):
        export_merged(trained(tiny_folder, targets), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_named_chat_templates_come_along(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tmp_path / "source"
    shutil.copytree(tiny_folder, source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages[0]['content'] }}!"}
    tokenizer.save_pretrained(source)
    export_merged(trained(source), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
