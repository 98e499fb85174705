"""Tests of packed checkpoints with transformers and bitsandbytes, in both directions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized, quantize_base_
from qlora_lite.checkpoints import atomic_folder
from qlora_lite.checkpoints.layouts.bitsandbytes_layout import ROWS_FILE
from qlora_lite.checkpoints.safetensors_read import TensorFiles
from qlora_lite.errors import CheckpointError, ConfigError, QuantizationError
from qlora_lite.export.quantized import save_quantized
from qlora_lite.quantization.experts import PackedStack
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight

TOKENS = torch.arange(12).view(2, 6)
QUANTS: list[dict[str, Any]] = [
    {},
    {"double_quant": False},
    {"format": "fp4"},
    {"format": "int8"},
    {"embedding_format": "int8"},
    {"format": "int8", "embedding_format": "int8"},
    {"skip_modules": ("lm_head", "model.layers.0.self_attn.q_proj", "down_proj")},
    {"blocksize": 128, "compute_dtype": torch.float32},
]


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def by_transformers(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def packed_by_transformers(source: Path, folder: Path, **options: Any) -> Any:
    """The checkpoint as transformers packs and saves it; the model that it saved."""
    from transformers import BitsAndBytesConfig

    model = by_transformers(source, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_comes_back_bit_for_bit_and_transformers_holds_the_same_bytes(
    tiny_folder: Path, tmp_path: Path, quant: dict[str, Any], dtype: torch.dtype
) -> None:
    model = load_quantized(tiny_folder, QuantConfig(**quant), dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    files = save_quantized(model, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert same(load_quantized(tmp_path / "out", dtype=dtype), model)
    asked = QuantConfig(format=quant.get("format", "nf4"), compute_dtype=quant.get("compute_dtype"))
    again = load_quantized(tmp_path / "out", asked, dtype=dtype)
    assert same(again, model) and not hasattr(again.config, "quantization_config")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert (ROWS_FILE in files) == ("embedding_format" in quant)

    theirs = by_transformers(tmp_path / "out")
    held = theirs.state_dict()  # before any forward, which may re-pack
    for name, tensor in TensorFiles(tmp_path / "out").items():
        assert torch.equal(held[name], tensor) and held[name].dtype == tensor.dtype, name
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    linears = {name for name, module in theirs.named_modules() if "bitsandbytes" in type(module).__module__}
    assert linears == packed - ({"lm_head"} if "embedding_format" in quant else set())
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight and theirs.dtype == dtype


@pytest.mark.parametrize(
    "quant", [quant for quant in QUANTS if quant.get("format") != "int8" and "blocksize" not in quant]
)
def test_transformers_gives_the_same_logits(tiny_folder: Path, tmp_path: Path, quant: dict[str, Any]) -> None:
    model = load_quantized(tiny_folder, QuantConfig(**quant))
    save_quantized(model, tmp_path / "out")
    theirs = by_transformers(tmp_path / "out")
    theirs.train()  # in eval mode its layers re-pack themselves and round their statistics; it has no dropout
    assert torch.equal(theirs(TOKENS).logits, model(TOKENS).logits)


def test_eight_bits_unpacked_by_transformers_give_the_same_logits(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig(format="int8"), dtype=torch.float32)
    save_quantized(model, tmp_path / "out")
    plain = by_transformers(tmp_path / "out").dequantize(torch.float32)
    torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_the_config_and_what_lies_beside_it(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = load_quantized(tiny_folder, QuantConfig(compute_dtype=torch.float32))
    save_quantized(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]
    said = config["quantization_config"]
    assert said["bnb_4bit_compute_dtype"] == "float32" and said["llm_int8_skip_modules"] == ["lm_head"]
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", tiny_folder))
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template
    packed_by_transformers(
        tiny_folder,
        tmp_path / "theirs",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    other = ("bnb_4bit_compute_dtype", "llm_int8_skip_modules")
    assert {name: written[name] for name in said if name not in other} == {
        name: value for name, value in said.items() if name not in other
    }


@pytest.mark.parametrize(
    ("options", "quant"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, {}),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"double_quant": False}),
        ({"load_in_4bit": True}, {"format": "fp4", "double_quant": False}),
        ({"load_in_8bit": True}, {"format": "int8"}),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
            {"double_quant": False},
        ),
    ],
)
def test_what_transformers_saved_is_loaded_with_its_bytes(
    tiny_folder: Path, tmp_path: Path, options: dict[str, Any], quant: dict[str, Any]
) -> None:
    theirs = packed_by_transformers(tiny_folder, tmp_path / "theirs", **options)
    ours = load_quantized(tmp_path / "theirs")
    # The same as packing here, which is the same as taking the live model over.
    assert same(ours, load_quantized(tiny_folder, QuantConfig(**quant)))
    quantize_base_(theirs, QuantConfig())
    assert same(ours, theirs)


def test_shards(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig(embedding_format="int8"))
    files = save_quantized(model, tmp_path / "out", max_shard_bytes=10_000)
    assert len(files) > 3 and same(load_quantized(tmp_path / "out"), model)
    theirs = by_transformers(tmp_path / "out").state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in TensorFiles(tmp_path / "out").items())


@pytest.mark.parametrize("quant", [{"embedding_format": "int8"}, {"format": "int8", "skip_modules": ()}])
def test_untied_heads(tiny_folder: Path, tmp_path: Path, quant: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_folder, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "untied")
    model = load_quantized(tmp_path / "untied", QuantConfig(**quant))
    save_quantized(model, tmp_path / "out")
    assert isinstance(model.lm_head.weight, PackedWeight) and same(load_quantized(tmp_path / "out"), model)
    theirs = by_transformers(tmp_path / "out")
    assert ("bitsandbytes" in type(theirs.lm_head).__module__) == ("embedding_format" not in quant)


def test_a_head_in_another_format_of_four_bits_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_folder, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "untied")
    model = load_quantized(tmp_path / "untied", QuantConfig("int8"))
    model.lm_head = QuantizedLinear(PackedWeight.of(model.lm_head.weight, QuantConfig("nf4")))
    with pytest.raises(ConfigError, match="this model has layers in int8 and nf4"):
        save_quantized(model, tmp_path / "out")


def test_half_precision_rows_are_saved_where_their_codes_come_back(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig(embedding_format="int8"), dtype=torch.float16)
    save_quantized(model, tmp_path / "out")
    assert same(load_quantized(tmp_path / "out", dtype=torch.float16), model)
    rows = by_transformers(tmp_path / "out").model.embed_tokens.weight
    assert torch.equal(rows, model.model.embed_tokens(torch.arange(len(rows))))
    model.model.embed_tokens.weight.absmax[7] = 5e-6
    with pytest.raises(QuantizationError, match=r"embed_tokens\.weight has rows too small for torch\.float16"):
        save_quantized(model, tmp_path / "tiny")
    save_quantized(model.to(torch.bfloat16), tmp_path / "tiny")
    assert same(load_quantized(tmp_path / "tiny"), model)


def test_what_no_packed_checkpoint_can_hold_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one format; this model has no packed layer"):
        save_quantized(load_quantized(tiny_folder, QuantConfig(format="none")), tmp_path / "out")
    model = load_quantized(tiny_folder, QuantConfig(skip_modules=("lm_head", "up_proj")))
    quantize_base_(model, QuantConfig("int8", skip_modules=("lm_head",)))
    with pytest.raises(ConfigError, match="this model has layers in int8 and nf4"):
        save_quantized(model, tmp_path / "out")
    model = load_quantized(tiny_folder)
    add_lora_(model, LoraConfig(rank=2))
    with pytest.raises(ConfigError, match=r"14 layers have adapters, .*; save_adapter writes them"):
        save_quantized(model, tmp_path / "out")
    with pytest.raises(ConfigError, match="max_shard_bytes must be an integer of at least 1; got 0"):
        save_quantized(model, tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(ConfigError, match="needs a transformers model with a config; got a Linear"):
        save_quantized(nn.Linear(2, 2), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_names_that_transformers_would_mix_up_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder)
    model._keep_in_fp32_modules = {"up_proj"}
    with pytest.raises(CheckpointError, match=r"packed layers for unpacked ones by their names: .*0\.mlp\.up_proj"):
        save_quantized(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(QuantizationError, match=r"model\.norm\.weight holds nan at index \(3,\)"):
        save_quantized(model, tmp_path / "out")


def test_folders_are_replaced_on_request_only(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_quantized(tiny_folder, QuantConfig(embedding_format="int8"))
    save_quantized(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="not empty"):
        save_quantized(model, tmp_path / "out")
    save_quantized(load_quantized(tiny_folder), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / ROWS_FILE).exists()
    with pytest.raises(CheckpointError, match="would replace the input"):
        save_quantized(load_quantized(tmp_path / "out"), tmp_path / "out", overwrite=True)
    monkeypatch.setattr(
        atomic_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000)
    )
    with pytest.raises(CheckpointError, match="has 1,000 free"):
        save_quantized(model, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


SAVE = """
from qlora_lite import load_quantized
from qlora_lite.export import save_quantized
save_quantized(load_quantized(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize("point", [2, 9])
def test_killed_half_way_it_leaves_nothing_under_the_name(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_while_writing: Callable[..., None],
    point: int,
) -> None:
    killed_while_writing(point, tmp_path, SAVE, tiny_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(list(tmp_path.glob(".out.*"))) == 1
    monkeypatch.setattr(atomic_folder, "ABANDONED_AFTER_SECONDS", -1)
    save_quantized(load_quantized(tiny_folder), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_stacks_that_were_skipped_are_loaded_as_they_were_saved(
    small_model: Callable[..., Any], tmp_path: Path
) -> None:
    small_model("MixtralConfig").save_pretrained(tmp_path / "source")
    says = (
        r"4 stacks of experts are packed, .*leave them unpacked with skip_modules=\['experts', 'lm_head'\] \(--skip-mo"
    )
    with pytest.raises(ConfigError, match=says):
        save_quantized(load_quantized(tmp_path / "source"), tmp_path / "packed")
    model = load_quantized(tmp_path / "source", QuantConfig(skip_modules=("experts", "lm_head")), dtype=torch.float32)
    save_quantized(model, tmp_path / "packed")
    again = load_quantized(tmp_path / "packed", dtype=torch.float32)
    assert same(again, model) and not any(isinstance(module, PackedStack) for module in again.modules())
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
