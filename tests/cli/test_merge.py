"""Tests of `qlora-lite train` followed by `qlora-lite merge`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite.cli.main import main
from qlora_lite.cli.merge import passed_over_line

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_train_and_merge(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from qlora_lite import QuantConfig, load_adapter_, load_quantized

    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"number {n}"}) for n in range(8)))
    words = ("train", "--model", tiny_folder, "--data", data, "--output", tmp_path / "run", "--steps", 6)
    where = ("--layers-to-transform", "0-1", "--exclude-modules", "k_proj, layers.1.mlp.up_proj")
    beside = ("--modules-to-save", "model.norm", "--trainable-token-indices", "5,6")
    done = run(*words, *where, *beside, "--rank", 2, "--use-rslora", "--learning-rate", 0.01, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["last_loss"] < figures["first_loss"] and figures["examples"] == 8
    again = run(*words)
    assert again.returncode == 1 and "not empty" in again.stderr and len(again.stderr.splitlines()) == 1

    adapter = tmp_path / "run" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["use_rslora"] is True and config["modules_to_save"] == ["model.norm"]
    assert config["trainable_token_indices"] == {"model.embed_tokens": [5, 6]}
    words = ("merge", "--model", tiny_folder, "--adapter", adapter, "--output", tmp_path / "merged")
    done = run(*words, "--dtype", "fp32", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    # Eleven layers, a norm and the embedding.
    assert figures["layers_merged"] == 13 and figures["embedding_and_head_untied"] is False
    assert figures["names"] == "checkpoint"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "number 9"}\n{"prompt": "number"}\n')
    done = run(*words, "--names", "model", "--verify", prompts, "--overwrite", "--json")
    assert done.returncode == 0, done.stderr
    said, figures = done.stdout.splitlines(), json.loads(done.stdout.splitlines()[-1])
    found = figures["verify"]
    assert figures["names"] == "model"
    assert found["sentence"] in said and "2 prompts" in done.stdout and found["adapter_loss"] < found["base_loss"]
    assert found == json.loads((tmp_path / "merged" / "merge_report.json").read_text())["verify"]
    ours = load_quantized(tiny_folder, QuantConfig())
    load_adapter_(ours, adapter)
    tokens = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(merged(tokens).logits, ours.float().eval()(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `merge` in this process: (words) -> (exit status, what was printed, what was said on stderr)."""

    def run_here(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qlora-lite", "merge", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run_here


def test_gguf_tells_what_it_wrote(
    merge: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_lite.export.gguf import merge as gguf_merge
    from qlora_lite.export.report import MergeReport, TensorFigures

    given: list[Any] = []
    report = MergeReport("original", "float32, then packed as q8_0", (TensorFigures("a", 4, 2.0, None, 1.0, 0.0, 4),))
    done = gguf_merge.GgufExport("model-q8_0.gguf", "llama", {"f32": 1, "q8_0": 2}, 1000, 0.005, report, False)
    monkeypatch.setattr(
        gguf_merge, "merge_checkpoint_to_gguf", lambda *words, **more: given.append((words, more)) or done
    )
    words = ("--model", "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "out", "--gguf", "q8_0")
    status, out, said = merge(*words, "--base", "original", "--format", "int8", "--any-base", "--json")
    assert (status, said) == (0, "")
    ((model, adapter, output, quant, type), more) = given[0]
    assert (model, adapter, output, quant.format, type) == (
        "base",
        tmp_path / "adapter",
        tmp_path / "out",
        "int8",
        "q8_0",
    )
    assert more == {
        "base": "original",
        "overwrite": False,
        "verify": None,
        "any_base": True,
        "ignore_unexpected": False,
    }
    figures = json.loads(out.splitlines()[-1])
    assert figures["file"] == str(tmp_path / "out" / "model-q8_0.gguf") and figures["layers_merged"] == 1
    assert (figures["tensors"], figures["tensors_in_q8_0"], figures["error_of_packing"]) == (3, 2, 0.005)


def test_an_adapter_alone_becomes_a_gguf_file(
    merge: Callable[..., tuple[int, str, str]], tiny_folder: Path, tmp_path: Path
) -> None:
    from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized, save_adapter

    model = load_quantized(tiny_folder, QuantConfig(format="none"))
    add_lora_(model, LoraConfig(rank=2, alpha=4, target_modules=["q_proj", "v_proj"]))
    save_adapter(model, tmp_path / "adapter")
    words = ("--model", tiny_folder, "--adapter", tmp_path / "adapter", "--output", tmp_path / "out")
    status, out, said = merge(*words, "--gguf", "f16", "--adapter-only", "--json")
    assert (status, said) == (0, "")
    figures = json.loads(out.splitlines()[-1])
    assert (figures["layers"], figures["alpha"], figures["architecture"]) == (4, 4.0, "llama")
    assert Path(figures["file"]).is_file() and "ADAPTER ./adapter-f16.gguf" in Path(figures["modelfile"]).read_text()
    again = merge(*words, "--gguf", "f16", "--adapter-only")
    assert again[0] == 1 and "is not empty" in again[2]


def test_gguf_refuses_options_of_folders_and_what_it_cannot_write(
    merge: Callable[..., tuple[int, str, str]], tiny_folder: Path, tmp_path: Path
) -> None:
    words = ("--model", tiny_folder, "--adapter", tmp_path / "adapter", "--output", tmp_path / "out", "--gguf")
    status, _, said = merge(*words, "q8_0", "--dtype", "fp16", "--names", "checkpoint")
    assert (status, said) == (2, "error: --names, --dtype and --gguf cannot be given together; leave one out\n")
    status, _, said = merge(*words, "f16", "--adapter-only", "--base", "original")
    assert (status, said) == (2, "error: --base and --adapter-only cannot be given together; leave one out\n")
    status, _, said = merge(*words[:-1], "--adapter-only")
    assert (status, said) == (2, "error: --adapter-only needs --gguf f32, f16 or bf16; got None\n")
    status, _, said = merge(*words, "q4_0", "--adapter-only")
    assert (status, said) == (2, "error: the type of a GGUF file must be f32, f16 or bf16; got 'q4_0'\n")
    status, _, said = merge(*words, "q3")
    assert (status, said) == (2, "error: the type of a GGUF file must be f32, f16, bf16, q8_0 or q4_0; got 'q3'\n")
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_not_merged_are_named() -> None:
    assert passed_over_line([]) == ""
    assert passed_over_line(["v_head.weight"]) == "1 tensors of the checkpoint are not merged: v_head.weight\n"
