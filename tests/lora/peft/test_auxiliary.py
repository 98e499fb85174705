"""Tests of modules_to_save, biases and token rows in peft's files, both ways, and in exports from memory and disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_adapter_, load_quantized, save_adapter
from qlora_lite.checkpoints.safetensors_read import TensorFiles
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.lora.adapters import adapter_parameters, adapters_disabled

TOKENS = torch.arange(12).view(2, 6)
PLAIN = QuantConfig(format="none")
CASES: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens", "input_layernorm"]},
    "norms": {"modules_to_save": ["norm"], "bias": "lora_only", "variant": "dora"},
    "biases": {"bias": "all", "modules_to_save": ["layers.1.self_attn.v_proj"]},
    "tokens": {"trainable_token_indices": [9, 3], "bias": "all"},
}


@pytest.fixture(scope="session")
def folders(small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Two checkpoints with biases: embedding and head tied, or not."""
    made = {}
    for tied in (True, False):
        made[tied] = tmp_path_factory.mktemp("tied" if tied else "untied")
        model = small_model("Qwen2Config", tie_word_embeddings=tied, num_hidden_layers=2)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(made[tied])
    return made


def base(folder: Path, config: QuantConfig = PLAIN) -> Any:
    return load_quantized(folder, config, dtype=torch.float32)


def trained(folder: Path, config: QuantConfig = PLAIN, **options: Any) -> Any:
    model = base(folder, config)
    add_lora_(model, LoraConfig(rank=3, alpha=7, target_modules=["q_proj", "down_proj"], **options))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits  # type: ignore[no-any-return]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours_and_we_read_pefts(folders: Any, tmp_path: Path, case: str, tied: bool) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    ours = trained(folders[tied], **CASES[case])
    save_adapter(ours, tmp_path / "ours")
    plain = AutoModelForCausalLM.from_pretrained(folders[tied], dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "ours")
    close(logits(theirs), logits(ours))
    assert (logits(base(folders[tied])) - logits(ours)).abs().max() > 0.01
    theirs.save_pretrained(tmp_path / "theirs")
    back = base(folders[tied])
    before = logits(back)
    load_adapter_(back, tmp_path / "theirs")
    close(logits(back), logits(ours))
    expected = adapter_parameters(ours)
    found = adapter_parameters(back)
    assert found.keys() == expected.keys() and all(parameter.requires_grad for parameter in found.values())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in found.items())
    with adapters_disabled(back):
        assert torch.equal(logits(back), before)
    with torch.no_grad():
        for parameter in found.values():
            parameter.zero_()
    load_adapter_(back, tmp_path / "ours")
    assert torch.equal(logits(back), logits(ours)) and adapter_parameters(back)[next(iter(found))] in found.values()


PEFTS: list[tuple[bool, dict[str, Any]]] = [
    (True, {"modules_to_save": ["norm"], "bias": "all"}),
    (True, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    (True, {"trainable_token_indices": [5, 2]}),
    (True, {"trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [7]}}),
    (False, {"trainable_token_indices": {"lm_head": [5, 2]}, "bias": "lora_only"}),
    (False, {"modules_to_save": ["classifier", "mlp"], "bias": "all", "target_modules": ["v_proj"]}),
]


@pytest.mark.parametrize(("tied", "options"), PEFTS)
def test_what_peft_trains_is_read_exported_and_given_back(
    folders: Any, tmp_path: Path, tied: bool, options: dict[str, Any]
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    def plain() -> Any:
        return AutoModelForCausalLM.from_pretrained(folders[tied], dtype=torch.float32)

    theirs = peft.get_peft_model(plain(), peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = base(folders[tied])
    load_adapter_(ours, tmp_path / "theirs")
    close(logits(ours), logits(theirs))
    save_adapter(ours, tmp_path / "ours")
    close(logits(peft.PeftModel.from_pretrained(plain(), tmp_path / "ours")), logits(theirs))
    single = torch.float32
    merge_checkpoint(folders[tied], tmp_path / "theirs", tmp_path / "out", PLAIN, single, load_dtype=single)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)), logits(theirs))


EXPORTS = {
    "packed": ({"modules_to_save": ["lm_head", "up_proj", "norm"], "bias": "all"}, True),
    "rows": ({"trainable_token_indices": [9, 3], "modules_to_save": ["input_layernorm"]}, False),
}


@pytest.mark.parametrize("case", EXPORTS)
@pytest.mark.parametrize("written", ["dequantized", "original"])
def test_an_export_has_what_was_trained_from_memory_as_from_disk(
    folders: Any, tmp_path: Path, case: str, written: str
) -> None:
    from transformers import AutoModelForCausalLM

    options, untied = EXPORTS[case]
    packing = QuantConfig(format="int8", embedding_format="int8")
    model = trained(folders[True], packing, **options)
    save_adapter(model, tmp_path / "adapter")
    ids = TOKENS[0].tolist()
    examples = [TokenizedExample(ids, [-100, *ids[1:]])]
    found = export_merged(model, tmp_path / "memory", torch.float32, base=written, verify=examples)
    assert found.untied == untied and found.verification is not None
    figures = found.verification.merged["dequantized"]
    assert figures is not None and figures.mean_kl < 1e-9 and figures.top1_agreement == 1
    merge_checkpoint(
        folders[True],
        tmp_path / "adapter",
        tmp_path / "disk",
        packing,
        torch.float32,
        base=written,
        load_dtype=torch.float32,
    )
    memory, disk = (dict(TensorFiles(tmp_path / name).items()) for name in ("memory", "disk"))
    assert memory.keys() == disk.keys() and all(torch.equal(tensor, disk[name]) for name, tensor in memory.items())
    assert ("lm_head.weight" in memory) == untied
    reports = [json.loads((tmp_path / name / "merge_report.json").read_text()) for name in ("memory", "disk")]
    one, other = ({row["name"]: row for row in report["tensors"]} for report in reports)
    assert one == other
    moved = {name for name, row in one.items() if row["update_norm"]}
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "disk", dtype=torch.float32)
    if case == "packed":
        assert {"lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"} <= moved
        assert {"model.layers.1.self_attn.q_proj.bias", "model.layers.1.self_attn.k_proj.bias"} <= moved
        assert torch.equal(memory["lm_head.weight"], model.lm_head.trained["weight"])
    else:
        assert "model.embed_tokens.weight" in moved and exported.lm_head.weight is exported.model.embed_tokens.weight
        assert torch.equal(memory["model.embed_tokens.weight"][[9, 3]], model.lm_head.rows.values)
    if written == "dequantized":
        torch.testing.assert_close(logits(exported), logits(model), rtol=1e-4, atol=1e-4)


def damaged(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    tensors, path = load_file(folder / "adapter_model.safetensors"), folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    path.write_text(json.dumps(config))


def without(part: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, config: [tensors.pop(key) for key in list(tensors) if part in key] and None


def with_nan(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["base_model.model.model.norm.weight"][0] = torch.nan


DAMAGES: list[tuple[Callable[[dict[str, Tensor], dict[str, Any]], None], str]] = [
    (
        without("model.norm"),
        "lacks 1 tensors that modules_to_save, bias or trainable_token_indices name: model.norm.weight",
    ),
    (without("q_proj.base_layer.bias"), r"lacks 2 tensors that .*: model.layers.0.self_attn.q_proj.bias"),
    (without("token_adapter"), "the token rows of model.embed_tokens"),
    (with_nan, "model.norm.weight holds NaN or infinity"),
    (lambda t, c: c.update(trainable_token_indices=[1, 2, 3]), r"token rows of model.embed_tokens is \(2, 32\)"),
    (lambda t, c: c.update(trainable_token_indices=[1, 99]), r"has 64 rows, and trainable_token_indices names 99$"),
    (lambda t, c: c.update(trainable_token_indices={"wte": [1]}), "has 'wte': .1., which is not a layer of this model"),
    (lambda t, c: c.update(modules_to_save=None), "keys that belong to no adapter.*model.norm.weight"),
    (lambda t, c: c.update(bias="boft_only"), "bias='boft_only' is not supported"),
]


@pytest.fixture(scope="module")
def saved(folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(
        trained(folders[True], modules_to_save=["norm"], trainable_token_indices=[9, 3], bias="lora_only"), folder
    )
    return folder


@pytest.mark.parametrize("index", range(len(DAMAGES)))
def test_a_damaged_file_is_refused_whole(folders: Any, saved: Path, tmp_path: Path, index: int) -> None:
    import shutil

    change, message = DAMAGES[index]
    shutil.copytree(saved, tmp_path / "adapter")
    damaged(tmp_path / "adapter", change)
    model = base(folders[True])
    before = list(model.named_modules())
    with pytest.raises(CheckpointError, match=message):
        load_adapter_(model, tmp_path / "adapter")
    assert list(model.named_modules()) == before


def test_other_things_trained_are_not_loaded_over(folders: Any, saved: Path) -> None:
    model = trained(folders[True], modules_to_save=["norm"], trainable_token_indices=[9, 4], bias="lora_only")
    with pytest.raises(CheckpointError, match="trains other modules_to_save, biases or token rows"):
        load_adapter_(model, saved)


def test_names_that_peft_would_take_for_more_are_refused(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(4, 4)
            self.norm, self.input_norm = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)

    model = Model()
    add_lora_(model, LoraConfig(target_modules=["up"], modules_to_save=["norm"]))
    with pytest.raises(ConfigError, match="peft would apply modules_to_save='norm' to input_norm too"):
        save_adapter(model, tmp_path / "adapter")
