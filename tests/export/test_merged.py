"""Tests of merged exports against transformers and against the adapted layers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_adapter_, load_quantized, save_adapter
from qlora_lite.checkpoints import atomic_folder, safetensors_write
from qlora_lite.checkpoints.safetensors_read import TensorFiles
from qlora_lite.errors import CheckpointError, ConfigError, QuantizationError, Stopped
from qlora_lite.export import merged, merged_tensor
from qlora_lite.export.quantized import save_quantized
from qlora_lite.lora.adapters import lora_layers

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
    files = export_merged(model, tmp_path / "many", max_shard_bytes=20_000).files
    one, many = dict(TensorFiles(tmp_path / "one").items()), dict(TensorFiles(tmp_path / "many").items())
    assert len(files) > 1 and one.keys() == many.keys()
    assert all(torch.equal(tensor, many[name]) and tensor.dtype == torch.float16 for name, tensor in one.items())
    for name, layer in lora_layers(model).items():
        assert torch.equal(one[f"{name}.weight"], layer.effective_weight(torch.float16))


def test_the_report_is_the_same_whatever_the_shards(tiny_folder: Path, tmp_path: Path) -> None:
    model = trained(tiny_folder)
    export_merged(model, tmp_path / "one")
    export_merged(model, tmp_path / "many", max_shard_bytes=20_000)
    one, many = ((tmp_path / name / "merge_report.json").read_text() for name in ("one", "many"))
    assert one == many


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_another_base_is_refused_on_disk_as_in_memory(
    tiny_folder: Path, tmp_path: Path, target: str
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    peft.get_peft_model(theirs, peft.LoraConfig(target_modules=[target])).save_pretrained(tmp_path / "a")
    merged.merge_checkpoint(tiny_folder, tmp_path / "a", tmp_path / "out")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(tensor for key, tensor in tensors.items() if key.endswith(f"{target}.base_layer.weight"))[-1, -1] += 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"{target} comes with a base weight that differs from the model's"):
        load_adapter_(load_quantized(tiny_folder), tmp_path / "a")
    with pytest.raises(CheckpointError, match=f"{target} comes with a base weight that differs from the checkpoint's"):
        merged.merge_checkpoint(tiny_folder, tmp_path / "a", tmp_path / "again")
    assert not (tmp_path / "again").exists()


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
    with pytest.raises(CheckpointError, match="does not exist any more"):
        export_merged(model, tmp_path / "again")


def test_weights_tied_by_hand_are_written_twice(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    untied = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_folder, tie_word_embeddings=False))
    untied.lm_head.weight = untied.model.embed_tokens.weight
    untied.config._name_or_path = ""
    export_merged(untied, tmp_path / "out", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, untied.lm_head.weight)


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("quant", [{}, {"format": "int8", "embedding_format": "int8"}])
def test_tied_weights_of_which_one_is_adapted_are_untied(
    tiny_folder: Path, tmp_path: Path, targets: list[str], quant: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    model = trained(tiny_folder, targets, **quant)
    assert export_merged(model, tmp_path / "out", torch.float32).untied
    assert model.config.tie_word_embeddings is True
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    for module, name in ((plain.lm_head, "lm_head"), (plain.model.embed_tokens, "model.embed_tokens")):
        layer = model.get_submodule(name)
        adapted = name.rpartition(".")[2] in targets
        weight = layer.base_layer.weight if adapted else layer.weight
        weight = weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)
        assert torch.equal(module.weight, layer.effective_weight(torch.float32) if adapted else weight)
        assert torch.equal(module.weight, weight) is not adapted
    assert not export_merged(trained(tiny_folder, ["q_proj"], **quant), tmp_path / "tied").untied
    assert "lm_head.weight" not in tensors_of(tmp_path / "tied")


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "v_proj"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("embedding_format", ["none", "int8"])
@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_untied_from_disk_to_disk_it_is_the_export_of_the_model_in_memory(
    tiny_folder: Path, tmp_path: Path, targets: list[str], embedding_format: str, base: str
) -> None:
    config = QuantConfig(format="int8", embedding_format=embedding_format)
    model = load_quantized(tiny_folder, config)
    ranks = {targets[0]: 2}
    add_lora_(model, LoraConfig(rank=3, alpha=7, target_modules=targets, use_rslora=True, rank_pattern=ranks))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    save_adapter(model, tmp_path / "adapter")
    live = export_merged(model, tmp_path / "live", torch.float32, base=base)
    done = merged.merge_checkpoint(
        tiny_folder, tmp_path / "adapter", tmp_path / "disk", config, torch.float32, base=base
    )
    assert same(tmp_path / "live", tmp_path / "disk")
    assert live.report == done.report and live.untied and done.untied
    configs = [(tmp_path / way / "config.json").read_text() for way in ("live", "disk")]
    assert json.loads(configs[0])["tie_word_embeddings"] is json.loads(configs[1])["tie_word_embeddings"] is False
    if base == "original":
        weight = tensors_of(tiny_folder)["model.embed_tokens.weight"]
        for name in ("lm_head", "model.embed_tokens"):
            layer = lora_layers(model).get(name)
            wanted = weight if layer is None else weight + layer.delta_weight()
            torch.testing.assert_close(tensors_of(tmp_path / "disk")[f"{name}.weight"], wanted, rtol=1e-6, atol=1e-6)


def test_named_chat_templates_come_along(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tmp_path / "source"
    shutil.copytree(tiny_folder, source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages[0]['content'] }}!"}
    tokenizer.save_pretrained(source)
    export_merged(trained(source), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(TensorFiles(folder).items())


def same(one: Path, other: Path) -> bool:
    left, right = tensors_of(one), tensors_of(other)
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize(
    "quant",
    [
        {},
        {"format": "fp4", "double_quant": False},
        {"format": "int8", "embedding_format": "int8"},
        {"format": "none"},
        {"skip_modules": ("q_proj", "lm_head")},
    ],
)
@pytest.mark.parametrize("base", ["dequantized", "original"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_from_disk_to_disk_it_is_the_export_of_the_model_in_memory(
    tiny_folder: Path, tmp_path: Path, quant: dict[str, Any], base: str, dtype: torch.dtype
) -> None:
    config = QuantConfig(**quant)
    model = load_quantized(tiny_folder, config)
    add_lora_(model, LoraConfig(rank=3, alpha=7))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    save_adapter(model, tmp_path / "adapter")
    live = export_merged(model, tmp_path / "live", dtype, base=base)
    disk = merged.merge_checkpoint(tiny_folder, tmp_path / "adapter", tmp_path / "disk", config, dtype, base=base)
    assert same(tmp_path / "live", tmp_path / "disk")
    assert live.report == disk.report
    written = {path.name for path in (tmp_path / "live").iterdir()}
    assert written == {path.name for path in (tmp_path / "disk").iterdir()} and "merge_report.json" in written
    if base == "dequantized":
        for name, layer in lora_layers(model).items():
            assert torch.equal(tensors_of(tmp_path / "disk")[f"{name}.weight"], layer.effective_weight(dtype))
    else:
        original = tensors_of(tiny_folder)
        for name, tensor in tensors_of(tmp_path / "disk").items():
            layer = lora_layers(model).get(name.removesuffix(".weight"))
            expected = original[name] if layer is None else original[name] + layer.delta_weight()
            exact = torch.finfo(dtype).eps
            torch.testing.assert_close(tensor.float(), expected.float(), rtol=exact, atol=1e-6)


def test_neither_slices_nor_shards_change_a_bit(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tiny_folder)
    save_adapter(model, tmp_path / "adapter")
    one = merged.merge_checkpoint(tiny_folder, tmp_path / "adapter", tmp_path / "one")
    monkeypatch.setattr(merged_tensor, "SLICE_BYTES", 1)
    many = merged.merge_checkpoint(tiny_folder, tmp_path / "adapter", tmp_path / "many", max_shard_bytes=30_000)
    assert len(many.files) > 1 and same(tmp_path / "one", tmp_path / "many")
    for figures, others in zip(one.report.tensors, many.report.tensors, strict=True):
        for value, again in zip(astuple(figures), astuple(others), strict=True):
            assert value == again or value == pytest.approx(again, rel=1e-9)


def test_a_damaged_tensor_stops_a_merge_that_packs_ahead(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "base")
    save_adapter(trained(tiny_folder), tmp_path / "adapter")
    tensors, name = tensors_of(tiny_folder), "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 2] = torch.nan
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    before = threading.active_count(), torch.get_num_threads()
    for base in ("dequantized", "original"):
        with pytest.raises(QuantizationError, match=rf"{name} holds nan at index \(3, 2\)"):
            merged.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", base=base, any_base=True)
    assert (threading.active_count(), torch.get_num_threads()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_report_counts_what_was_packed_and_what_was_added(tiny_folder: Path, tmp_path: Path) -> None:
    model = trained(tiny_folder)
    report = export_merged(model, tmp_path / "out", torch.bfloat16).report
    original = tensors_of(tiny_folder)
    by_name = {figures.name: figures for figures in report.tensors}
    for name, layer in lora_layers(model).items():
        figures, packed = by_name[f"{name}.weight"], layer.base_layer.weight.dequantize(torch.float32)
        assert figures.update == pytest.approx(float(layer.delta_weight().square().sum()), rel=1e-4)
        error = float((packed - original[f"{name}.weight"]).square().sum())
        assert figures.quantization == pytest.approx(error, rel=1e-4)
        unmoved = (layer.effective_weight(torch.bfloat16) == packed.bfloat16()).sum()
        assert figures.moved == figures.values - int(unmoved)
    assert by_name["model.norm.weight"].update is by_name["model.norm.weight"].quantization is None
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert written == report.to_json()


def test_too_little_room_is_seen_before_the_first_byte(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        atomic_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000)
    )
    monkeypatch.setattr(merged, "write_sharded", lambda *given: pytest.fail("something was written"))
    with pytest.raises(CheckpointError, match=r"bytes and the disk of .* has 1,000 free"):
        export_merged(trained(tiny_folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_there_is_no_original_of_cannot_be_merged_into_it(tiny_folder: Path, tmp_path: Path) -> None:
    model = trained(tiny_folder)
    model.config._name_or_path = ""
    with pytest.raises(CheckpointError, match="needs the checkpoint that the model was loaded from"):
        export_merged(model, tmp_path / "out", base="original")
    with pytest.raises(ConfigError, match="base must be dequantized or original; got 'mine'"):
        export_merged(model, tmp_path / "out", base="mine")
    report = export_merged(model, tmp_path / "out").report
    assert report.total().quantization is None


def test_an_export_has_what_llama_cpps_converter_reads(tiny_folder: Path, tmp_path: Path) -> None:
    """Stands in for the converter itself, which is no package: it takes float tensors by the architecture's names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    before = os.umask(0o027)
    try:
        export_merged(trained(tiny_folder), tmp_path / "out")
    finally:
        os.umask(before)
    tensors = tensors_of(tmp_path / "out")
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_folder))
    assert tensors.keys() == plain.state_dict().keys() - {"lm_head.weight"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= files.keys()
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o640}


MERGE = """
from qlora_lite import export
export.merge_checkpoint(*sys.argv[1:4], max_shard_bytes=30_000)
"""


@pytest.mark.parametrize("point", [2, 12, 30])
def test_killed_it_leaves_nothing_under_the_name_and_the_same_command_finishes(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_while_writing: Callable[..., None],
    point: int,
) -> None:
    save_adapter(trained(tiny_folder), tmp_path / "adapter")
    words = (tiny_folder, tmp_path / "adapter", tmp_path / "out")
    killed_while_writing(point, tmp_path, MERGE, *words)
    assert not (tmp_path / "out").exists() and len(list(tmp_path.glob(".out.*"))) == 1
    monkeypatch.setattr(atomic_folder, "ABANDONED_AFTER_SECONDS", -1)
    merged.merge_checkpoint(*words)
    merged.merge_checkpoint(*words[:2], tmp_path / "again")
    assert same(tmp_path / "out", tmp_path / "again") and not list(tmp_path.glob(".out.*"))


def test_terminated_it_leaves_what_was_there(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(trained(tiny_folder), tmp_path / "adapter")
    words = (tiny_folder, tmp_path / "adapter", tmp_path / "out")
    merged.merge_checkpoint(*words)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write, left = safetensors_write._Writer.write, [20]

    def some(writer: Any, piece: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)
        assert left[0] > -2  # it is obeyed at the next slice
        write(writer, piece)

    monkeypatch.setattr(safetensors_write._Writer, "write", some)
    with pytest.raises(Stopped, match="stopped by SIGTERM; nothing is left half-written"):
        merged.merge_checkpoint(*words, dtype=torch.float32, overwrite=True)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}


@pytest.mark.parametrize(
    "quant",
    [{}, {"format": "fp4", "double_quant": False}, {"format": "int8"}, {"embedding_format": "int8"}],
)
def test_adapters_on_a_packed_checkpoint_merge_as_on_the_one_it_was_packed_from(
    tiny_folder: Path, tmp_path: Path, quant: dict[str, Any]
) -> None:
    save_quantized(load_quantized(tiny_folder, QuantConfig(**quant)), tmp_path / "packed")
    model = trained(tiny_folder, **quant)
    save_adapter(model, tmp_path / "adapter")
    merged.merge_checkpoint(tiny_folder, tmp_path / "adapter", tmp_path / "plain", QuantConfig(**quant))
    disk = merged.merge_checkpoint(tmp_path / "packed", tmp_path / "adapter", tmp_path / "disk")
    assert same(tmp_path / "disk", tmp_path / "plain")
    from_packed = load_quantized(tmp_path / "packed")
    load_adapter_(from_packed, tmp_path / "adapter")
    live = export_merged(from_packed, tmp_path / "live")
    assert same(tmp_path / "live", tmp_path / "plain") and live.report == disk.report
    assert disk.report.total().quantization is None and disk.report.total().update is not None
    for folder in ("live", "disk"):
        assert "quantization_config" not in json.loads((tmp_path / folder / "config.json").read_text())


def test_a_packed_checkpoint_has_no_original(tiny_folder: Path, tmp_path: Path) -> None:
    save_adapter(trained(tiny_folder), tmp_path / "adapter")
    for format in ("nf4", "int8"):
        packed = tmp_path / format
        save_quantized(load_quantized(tiny_folder, QuantConfig(format)), packed)
        with pytest.raises(CheckpointError, match=f"merges into full-precision weights and {packed} holds packed ones"):
            merged.merge_checkpoint(packed, tmp_path / "adapter", tmp_path / "out", base="original")
        with pytest.raises(CheckpointError, match="holds packed ones"):
            export_merged(load_quantized(packed), tmp_path / "out", base="original")
    assert not (tmp_path / "out").exists()
