"""Tests of whole GGUF exports: adapters merged, from memory and from disk, read by transformers, refused or atomic."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_quantized, save_adapter
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export.gguf import export_gguf, library, merge, merge_checkpoint_to_gguf
from qlora_lite.lora.adapters import lora_layers

NF4 = QuantConfig(format="nf4")


@pytest.fixture(scope="module")
def trained(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """A packed Llama with an adapter, and a folder with its base and the adapter."""
    folder = tmp_path_factory.mktemp("trained")
    base = make_model("LlamaConfig", hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    base.generation_config.eos_token_id = [0, 1]
    for name, weight in base.named_parameters():  # so that attention differs from token to token
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "embed_tokens.weight")):
            weight.data.mul_(20)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = load_quantized(folder / "base", NF4, dtype=torch.float32)
    add_lora_(model, LoraConfig(rank=4, alpha=8, target_modules="all-linear"))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    save_adapter(model, folder / "adapter")
    return model.eval(), folder


def test_transformers_computes_what_the_merged_model_does(trained: tuple[Any, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, folder = trained
    done = export_gguf(model, tmp_path / "out", "f16")
    assert (done.file, done.architecture, done.relative_error) == ("model-f16.gguf", "llama", None)
    export_merged(model, tmp_path / "plain", torch.float16)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=done.file, dtype=torch.float32)
    theirs, ours = (AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=done.file),
                    AutoTokenizer.from_pretrained(folder / "base"))  # fmt: skip
    text = "The cat 12 <|user|> didn't"
    ids = ours(text, return_tensors="pt")["input_ids"]
    assert theirs(text)["input_ids"] == ids[0].tolist()
    # Norms are f32 in the one file and f16 in the other.
    torch.testing.assert_close(read(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0, atol=0.02)
    for name in ("mlp.up_proj", "self_attn.q_proj"):
        stored = load_file(tmp_path / "plain" / "model.safetensors")[f"model.layers.0.{name}.weight"]
        assert torch.equal(read.get_parameter(f"model.layers.0.{name}.weight").half(), stored)


@pytest.mark.parametrize("type", ["bf16", "q4_0"])
def test_from_disk_the_file_is_the_same(trained: tuple[Any, Path], tmp_path: Path, type: str) -> None:
    model, folder = trained
    done = export_gguf(model, tmp_path / "memory", type)
    again = merge_checkpoint_to_gguf(
        folder / "base", folder / "adapter", tmp_path / "disk", NF4, type, load_dtype=torch.float32
    )
    assert (tmp_path / "memory" / done.file).read_bytes() == (tmp_path / "disk" / again.file).read_bytes()
    assert again.relative_error == (None if type == "bf16" else pytest.approx(done.relative_error))
    limit = {"bf16": None, "q8_0": 0.01, "q4_0": 0.15}[type]
    assert (done.relative_error is None) if limit is None else limit / 20 < (done.relative_error or 0) < limit


def test_the_folder_tells_what_it_holds(trained: tuple[Any, Path], tmp_path: Path, fields: Any) -> None:
    model, _ = trained
    done = export_gguf(model, tmp_path / "out", "q4_0")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "Modelfile",
        "merge_report.json",
        "model-q4_0.gguf",
    ]
    assert (tmp_path / "out" / "Modelfile").read_text() == (
        'FROM ./model-q4_0.gguf\nPARAMETER stop "<|end|>"\nPARAMETER stop "<|user|>"\n'
    )
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["gguf"] == done.to_json() and report["dtype"] == "float32, then packed as q4_0"
    assert done.types == {"f32": 3, "f16": 1, "q8_0": 2, "q4_0": 6} and report["gguf"]["read_back"] == "equal"
    read = fields(tmp_path / "out" / done.file)
    assert read["general.file_type"] == 2 and read["general.name"] == "base" and read["llama.vocab_size"] == 304


def test_verification_runs_the_values_of_the_file(trained: tuple[Any, Path], tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    from qlora_lite.data import tokenize_all
    from qlora_lite.export.verify import DEQUANTIZED

    model, _ = trained
    examples = tokenize_all([{"text": "The cat sat on the mat, didn't it?"}], tokenizer).examples
    verification = export_gguf(model, tmp_path / "out", "q4_0", verify=examples).verification
    assert verification is not None
    # What transformers computes with its own reader of the file.
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model-q4_0.gguf", dtype=torch.float32)
    ids = torch.tensor([examples[0].input_ids])
    with torch.no_grad():
        ours, theirs = (found(ids).logits.log_softmax(-1) for found in (model, read.eval()))
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
    found = verification.merged[DEQUANTIZED]
    assert found is not None and found.mean_kl == pytest.approx(float(divergence), rel=0.01)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["verify"] == verification.to_json()


def test_nothing_is_left_of_a_file_that_reads_back_wrong(
    trained: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = trained
    write = library.write_gguf

    def damaged(path: Path, *rest: Any) -> Any:
        written = write(path, *rest)
        content = bytearray(path.read_bytes())
        content[-4000] ^= 1
        path.write_bytes(content)
        return written

    monkeypatch.setattr(merge, "write_gguf", damaged)
    with pytest.raises(CheckpointError, match="was read back with another"):
        export_gguf(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_files_are_on_the_disk_before_the_folder_has_its_name(
    trained: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, flushed = os.fsync, set()

    def recorded(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    export_gguf(trained[0], tmp_path / "out", "q8_0")
    assert {path.stat().st_ino for path in (tmp_path / "out").iterdir()} <= flushed


def test_refusals_come_before_anything_is_written(trained: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = trained
    with pytest.raises(ConfigError, match="must be f32, f16, bf16, q8_0 or q4_0; got 'q5_0'"):
        export_gguf(model, tmp_path / "out", "q5_0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model-f16.gguf").touch()
    with pytest.raises(CheckpointError, match="is not empty"):
        export_gguf(model, tmp_path / "full")
    export_gguf(model, tmp_path / "full", overwrite=True)  # files of an export are replaced
    with pytest.raises(CheckpointError, match="would replace the input"):
        merge_checkpoint_to_gguf(folder / "base", folder / "adapter", folder / "base", NF4, overwrite=True)
    with pytest.raises(ConfigError, match="export needs a transformers model with a config; got a Linear"):
        export_gguf(nn.Linear(2, 2), tmp_path / "out")
    from transformers import LlamaModel

    headless = LlamaModel(model.config)
    headless.config._name_or_path = str(folder / "base")
    with pytest.raises(CheckpointError, match="of causal language models; a LlamaModel has no output head"):
        export_gguf(headless, tmp_path / "out")
    homeless = make_homeless(model)
    with pytest.raises(CheckpointError, match="a GGUF file holds the tokenizer, and the model came from no folder"):
        export_gguf(homeless, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def make_homeless(model: Any) -> Any:
    from transformers import LlamaForCausalLM

    config = type(model.config).from_dict(model.config.to_dict())
    config._name_or_path = ""
    return LlamaForCausalLM(config)
