"""Tests of runs that go on from an adapter: its settings, its values, and options that contradict it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_adapter_, load_quantized, save_adapter
from qlora_lite.checkpoints.safetensors_read import read_safetensors
from qlora_lite.cli.training.first_adapter import check_layers, lora_config_of_adapter
from qlora_lite.errors import CheckpointError, TargetError

Run = Callable[..., subprocess.CompletedProcess[str]]
CONFIG = LoraConfig(4, 8, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"], rank_pattern={"v_proj": 2})


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose B is not zero."""
    model = load_quantized(tiny_folder, QuantConfig())
    add_lora_(model, CONFIG)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    save_adapter(model, folder)
    return folder


def test_the_settings_of_an_adapter(adapter: Path, tmp_path: Path) -> None:
    found = lora_config_of_adapter(adapter)
    assert (found.rank, found.alpha, found.bias, found.modules_to_save) == (4, 8, "none", ("model.norm",))
    assert set(found.target_modules) == {"q_proj", "v_proj"} and found.rank_of("model.layers.0.self_attn.v_proj") == 2
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json; name an adapter in it: "):
        lora_config_of_adapter(adapter.parent)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json does not exist"):
        lora_config_of_adapter(tmp_path)


def test_an_adapter_of_the_first_peft_has_settings(tmp_path: Path) -> None:
    options = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": r".*\.q_proj", "bias": "lora_only"}
    options["trainable_token_indices"] = {"embed_tokens": [3, 1]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options), encoding="utf-8")
    found = lora_config_of_adapter(tmp_path)
    assert (found.rank, found.bias, found.target_modules) == (16, "lora_only", r".*\.q_proj")
    assert found.trainable_token_indices == (3, 1)


def test_other_layers_are_refused(adapter: Path) -> None:
    check_layers(None, ["a"], adapter)
    check_layers({"a", "b"}, ["b", "a"], adapter)
    with pytest.raises(TargetError, match="choose: not c, and also b; leave out these options"):
        check_layers({"a", "c"}, ["a", "b"], adapter)


@pytest.fixture
def words(tiny_folder: Path, tmp_path: Path, adapter: Path) -> tuple[Any, ...]:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"number {n}"}) for n in range(6)), encoding="utf-8")
    start = ("train", "--model", tiny_folder, "--data", data, "--steps", 1, "--no-token-cache")
    return (*start, "--from-adapter", adapter, "--output", tmp_path / "next")


def test_a_run_begins_with_the_values_of_the_adapter(
    run: Run, words: tuple[Any, ...], adapter: Path, tmp_path: Path
) -> None:
    """With a rate of almost 0, the values are those of the adapter after the step too."""
    done = run(*words, "--learning-rate", 1e-30, "--alpha", 8, "--target-modules", "q_proj,v_proj")
    assert done.returncode == 0, done.stderr
    assert f"4 layers go on from {adapter}" in done.stdout
    before, after = (
        read_safetensors(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "next" / "adapter")
    )
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    kept = (tmp_path / "next" / "run.yaml").read_text(encoding="utf-8").splitlines()
    assert {f"from_adapter: {adapter}", "alpha: 8.0", "# rank: that of from_adapter"} <= {*kept}
    again = run("train", tmp_path / "next", "--output", tmp_path / "third", "--learning-rate", 0.1)
    assert again.returncode == 0, again.stderr
    third = read_safetensors(tmp_path / "third" / "adapter" / "adapter_model.safetensors")
    assert not any(before[name].equal(third[name]) for name in before if "lora_B" in name), "all of it is trained"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--rank", 8), "adapter has rank 4, not 8 (--rank); leave out what contradicts the adapter"),
        (
            ("--dropout", 0.1, "--bias", "all"),
            "has dropout 0, not 0.1 (--dropout), has bias none, not all (--bias)",
        ),
        (("--init-lora-weights", "pissa"), "--init-lora-weights pissa has nothing to start"),
        (("--modules-to-save", "lm_head"), "has modules_to_save model.norm, not lm_head"),
        (("--target-modules", "q_proj"), "adapts other layers than --target-modules"),
        (("--overwrite", "--output", "{folder}"), "would replace the input"),
    ],
)
def test_what_contradicts_the_adapter_is_refused(
    run: Run, words: tuple[Any, ...], adapter: Path, more: tuple[Any, ...], sentence: str, tmp_path: Path
) -> None:
    base = words[:-2] if "--output" in more else words
    done = run(*base, *(str(word).format(folder=adapter.parent) for word in more))
    assert done.returncode in (1, 2) and sentence in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "next").exists()


def test_the_base_is_that_of_the_adapter(
    run: Run, words: tuple[Any, ...], make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path / "other", hidden=32)
    done = run(*("--model" if word == "--model" else word for word in words[:2]), other, *words[3:])
    assert done.returncode == 1 and "was trained on a model of another size" in done.stderr


def test_in_python_an_adapter_is_loaded_and_trained(adapter: Path, tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig())
    load_adapter_(model, adapter)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.endswith("q_proj.lora_A") for name in trained) and all("lora" in n or "norm" in n for n in trained)
