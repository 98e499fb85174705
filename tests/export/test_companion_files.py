"""Tests of the files of an export besides its tensors: what changes in config.json, and which files are copied."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_quantized, save_adapter
from qlora_lite.checkpoints.atomic_folder import check_replaceable
from qlora_lite.checkpoints.hub import empty_model, read_config
from qlora_lite.errors import CheckpointError
from qlora_lite.export import companion_files
from qlora_lite.export.companion_files import write_companion_files
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.export.quantized import save_quantized

# As a release 4 of transformers wrote it, with keys that no release knows.
OLD_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "some/repository--modeling_x.X"},
    "transformers_version": "4.40.0",
    "model_type": "llama",
    "rope_theta": 500000.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "torch_dtype": "bfloat16",
    "zz_unknown": {"kept": [1, 2]},
    "attention_bias": False,
}
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"),
    *("processor_config.json", "video_preprocessor_config.json", "tekken.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken"),
    *("chat_template.jinja", "LICENSE", "LICENSE.txt", "USE_POLICY.md", "Notice.txt", "vocab.txt"),
)
LEFT = (
    *("README.md", "pytorch_model.bin", "training_args.bin", "model.gguf", "rng_state.pth", "consolidated.safetensors"),
    *("modeling_x.py", "tokens.pkl", ".hidden.json", "adapter_config.json", "params.json", "trainer_state.json"),
    *("pytorch_model.bin.index.json", "model.safetensors.index.json", "notes.txt", "quantize_config.json"),
)


@pytest.fixture
def old_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "old"
    shutil.copytree(tiny_folder, folder)
    written = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")} | OLD_CONFIG
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_a_config_differs_from_the_bases_in_what_the_export_changed(old_folder: Path, tmp_path: Path) -> None:
    before = config_of(old_folder)
    model = load_quantized(old_folder)
    write_companion_files(model, old_folder, tmp_path, torch.float16)
    changed = {"torch_dtype": "float16", "auto_map": {"AutoModelForCausalLM": "some/repository--modeling_x.X"}}
    assert config_of(tmp_path) == before | changed
    assert read_config(tmp_path).rope_parameters["rope_theta"] == 500000.0
    write_companion_files(model, old_folder, tmp_path, torch.float32, untie=True)
    assert config_of(tmp_path) == before | changed | {"torch_dtype": "float32", "tie_word_embeddings": False}
    assert model.config.tie_word_embeddings is True
    said = {"quant_method": "bitsandbytes"}
    write_companion_files(model, old_folder, tmp_path, torch.bfloat16, said)
    assert config_of(tmp_path) == before | changed | {"torch_dtype": "bfloat16", "quantization_config": said}


def test_what_was_changed_on_the_model_is_written(old_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(old_folder, QuantConfig(format="none"))
    model.resize_token_embeddings(112)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    export_merged(model, tmp_path / "out")
    written = config_of(tmp_path / "out")
    assert written["vocab_size"] == 112 and written["zz_unknown"] == OLD_CONFIG["zz_unknown"]
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    assert not {"rope_theta", "rope_scaling"} & written.keys()


def test_both_spellings_of_a_dtype_are_set_and_one_is_added(old_folder: Path, tmp_path: Path) -> None:
    before = config_of(old_folder)
    model = load_quantized(old_folder)
    for given, expected in (
        ({"dtype": "bfloat16"}, {"dtype": "float16", "torch_dtype": "float16"}),
        ({"torch_dtype": None}, {"torch_dtype": "float16"}),
        ({}, {"torch_dtype": "float16"}),
    ):
        config = {**before, **given}
        if not given:
            del config["torch_dtype"]
        (old_folder / "config.json").write_text(json.dumps(config))
        write_companion_files(model, old_folder, tmp_path, torch.float16)
        found = config_of(tmp_path)
        assert {key: found[key] for key in ("dtype", "torch_dtype") if key in found} == expected
        assert read_config(tmp_path).dtype == torch.float16


def test_architectures_are_those_of_the_file_unless_the_model_is_another(old_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(old_folder)
    for given, expected in ((["LlamaModel"], ["LlamaForCausalLM"]), (["LlamaForCausalLM", "X"],) * 2):
        (old_folder / "config.json").write_text(json.dumps(config_of(old_folder) | {"architectures": given}))
        write_companion_files(model, old_folder, tmp_path, torch.float16)
        assert config_of(tmp_path)["architectures"] == expected


def test_without_a_source_it_is_the_models_own_config(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import Gemma3Config

    model = empty_model(read_config(tiny_folder), torch.bfloat16)
    nested = SimpleNamespace(config=Gemma3Config())  # says twice whether it is tied
    for given in (model, nested):
        before = given.config.to_dict()
        for untie in (False, True):
            write_companion_files(given, None, tmp_path, torch.float16, untie=untie)
            written = config_of(tmp_path)
            assert written["dtype"] == "float16" and written["architectures"] == [type(given).__name__]
            for part in (written, written.get("text_config", written)):
                assert part.get("tie_word_embeddings", True) is not untie
        assert given.config.to_dict() == before and given.config.tie_word_embeddings
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json"}


def test_companion_files_come_along_and_others_do_not(tiny_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "from", tmp_path / "to"
    shutil.copytree(tiny_folder, source)
    for name in (*COPIED, *LEFT):
        (source / name).write_text("{}" if name.endswith(".json") else name)
    with_code = {"AutoProcessor": "processing_x.X"}
    (source / "processor_config.json").write_text(json.dumps({"a": 1, "auto_map": with_code}))
    os.mkfifo(source / "pipe.json")
    (source / "onnx").mkdir()
    (source / "onnx" / "config.json").write_text("{}")
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("rag")
    (templates / "rag.py").write_text("rag")
    out.mkdir()
    write_companion_files(empty_model(read_config(source), torch.bfloat16), source, out, torch.float16)
    written = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}
    kept = {path.name for path in tiny_folder.iterdir()} - {"model.safetensors"}
    assert written == {*COPIED, *kept, "generation_config.json", "additional_chat_templates/rag.jinja"}
    for name in written - {"config.json", "generation_config.json", "processor_config.json"}:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "processor_config.json").read_text()) == {"a": 1}
    check_replaceable(out, overwrite=True)  # an export with all of them can be overwritten
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"they would be lost: notes\.txt"):
        check_replaceable(out, overwrite=True)


def test_a_companion_of_absurd_size_is_named(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(companion_files, "LARGEST_COMPANION", 10)
    with pytest.raises(CheckpointError, match=r"bytes; expected a companion file of a checkpoint, of at most 10"):
        write_companion_files(
            empty_model(read_config(tiny_folder), torch.bfloat16), tiny_folder, tmp_path, torch.float16
        )


def test_a_generation_config_is_copied_unless_it_was_changed(tiny_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "from", tmp_path / "to"
    shutil.copytree(tiny_folder, source)
    given = '{"eos_token_id": 1, "zz_unknown":  5, "transformers_version": "4.40.0"}'
    (source / "generation_config.json").write_text(given)
    out.mkdir()
    model = load_quantized(source)
    write_companion_files(model, source, out, torch.float16)
    assert (out / "generation_config.json").read_text() == given
    model.generation_config.max_new_tokens = 7
    write_companion_files(model, source, out, torch.float16)
    written = json.loads((out / "generation_config.json").read_text())
    assert written["max_new_tokens"] == 7 and written["eos_token_id"] == 1


def test_a_packed_checkpoint_keeps_the_bases_spellings_too(old_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (old_folder / "LICENSE").write_text("free")
    save_quantized(load_quantized(old_folder), tmp_path / "packed")
    written = config_of(tmp_path / "packed")
    assert written["rope_theta"] == 500000.0 and written["torch_dtype"] == "bfloat16"
    assert written["quantization_config"]["quant_method"] == "bitsandbytes"
    assert (tmp_path / "packed" / "LICENSE").read_text() == "free"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert theirs.config.rope_parameters["rope_theta"] == 500000.0
    export_merged(load_quantized(tmp_path / "packed"), tmp_path / "plain")
    assert "quantization_config" not in config_of(tmp_path / "plain")


def test_an_export_gets_a_card_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    source = tmp_path / "Base-1B"
    shutil.copytree(tiny_folder, source)
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: de\nbase_model: other/base\n---\nThe base's text.")
    model = load_quantized(source)
    save_quantized(model, tmp_path / "packed")
    add_lora_(model, LoraConfig(rank=2))
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "live", base="original")
    merge_checkpoint(source, tmp_path / "adapter", tmp_path / "disk", base="original")
    packed, live = ModelCard.load(tmp_path / "packed/README.md"), ModelCard.load(tmp_path / "live/README.md")
    common = {"base_model": "Base-1B", "library_name": "transformers", "license": "mit", "language": "de"}
    assert live.data.to_dict() == {
        **common,
        "base_model_relation": "finetune",
        "tags": ["lora", "merged", "qlora-lite"],
    }
    assert packed.data.to_dict() == {
        **common,
        "base_model_relation": "quantized",
        "tags": ["bitsandbytes", "nf4", "qlora-lite"],
    }
    assert "| weights that the adapter was added to | the checkpoint's own |" in live.text
    assert "| packed as | nf4 |" in packed.text and "The base's text." not in live.text + packed.text
    assert (tmp_path / "disk/README.md").read_bytes() == (tmp_path / "live/README.md").read_bytes()
    (tmp_path / "live/README.md").write_text("mine")
    export_merged(model, tmp_path / "live", overwrite=True)
    assert (tmp_path / "live/README.md").read_text() == "mine"
