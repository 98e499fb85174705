"""Tests of `qlora-lite inspect`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lite import LoraConfig, add_lora_, save_adapter
from qlora_lite.cli.main import main

Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    """(words) -> (exit status, what was printed, what was said on stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qlora-lite", "inspect", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_what_it_is_and_who_takes_it(inspect: Inspect, small_model: Callable[..., Any], tmp_path: Path) -> None:
    model = small_model("LlamaConfig")
    add_lora_(model, LoraConfig(2, 8, target_modules=["q_proj", "embed_tokens"], use_rslora=True))
    save_adapter(model, tmp_path)
    status, out, _ = inspect(tmp_path, "--json", "--require", "vllm")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].endswith(": lora, scaled by alpha / sqrt(rank), in float32") and lines[1] == "base model: unknown"
    rows = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert rows["embed_tokens"] == ["embed_tokens", "embedding", "1", "2", "8", "5.65685", "192", "0.8", "KiB"]
    assert rows["q_proj"][:6] == ["q_proj", "linear", "2", "2", "8", "5.65685"] and rows["all"][1:3] == ["3", "448"]
    assert "vllm: accepted" in lines and "llama.cpp: not accepted" in lines
    assert "  because of use_rslora: not read, each layer would be scaled by alpha / rank" in lines
    said = json.loads(lines[-1])
    assert said["verdicts"]["vllm"]["accepted"] and not said["verdicts"]["llama.cpp"]["accepted"]
    assert said["layers"] == 3 and said["bytes"] == 4 * 448

    assert inspect(tmp_path, "--require", "vllm", "--require", "llama.cpp")[0] == 1
    assert inspect(tmp_path, "--require", "vllm", "--max-lora-rank", 1)[0] == 1


def test_bad_input_is_one_sentence(inspect: Inspect, tmp_path: Path) -> None:
    status, _, said = inspect(tmp_path)
    assert (status, said) == (1, f"error: {tmp_path / 'adapter_config.json'} does not exist; expected a JSON file\n")
    status, _, said = inspect(tmp_path, "--require", "ollama")
    assert status == 2 and "must be peft, vllm or llama.cpp for an adapter; got 'ollama'" in said


def test_layers_that_peft_loses_are_named_by_the_type_of_the_base(
    inspect: Inspect, small_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = small_model("Qwen3MoeConfig", mlp_only_layers=[0])
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    add_lora_(model, LoraConfig(2, 4, target_modules=["q_proj", "up_proj", "gate_proj"]))
    save_adapter(model, tmp_path / "adapter")
    status, out, _ = inspect(tmp_path / "adapter", "--require", "peft")
    assert status == 1 and "peft: not accepted" in out
    assert "  because of peft would not load the adapters of 2 layers (model.layers.0.mlp.gate_proj, " in out


def test_a_checkpoint_is_checked_for_its_readers(
    inspect: Inspect, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = inspect(tiny_folder, "--json", "--require", "llama.cpp")
    lines = out.splitlines()
    assert status == 1 and lines[0].startswith(f"{tiny_folder}: llama, 20 tensors, ") and "vllm: not accepted" in lines
    assert any("its model is WordLevel, and llama.cpp reads BPE" in line for line in lines)
    said = json.loads(lines[-1])
    assert set(said["verdicts"]) == {"vllm", "llama.cpp", "transformers-4"} and said["model_type"] == "llama"
    assert inspect(tiny_folder)[0] == 0
    status, _, said = inspect(tiny_folder, "--require", "peft")
    assert status == 2 and "must be vllm, llama.cpp or transformers-4 for a checkpoint; got 'peft'" in said
    status, _, said = inspect(tiny_folder, "--model", tiny_folder)
    assert status == 2 and "--model and a checkpoint cannot be given together" in said
    monkeypatch.setitem(sys.modules, "gguf", None)
    status, out, _ = inspect(tiny_folder, "--require", "transformers-4")
    assert status == 1 and "llama.cpp: not checked, which needs the gguf package" in out
