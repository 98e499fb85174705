"""Tests of `qlora-lite train` followed by `qlora-lite merge`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

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


def test_tensors_that_are_not_merged_are_named() -> None:
    assert passed_over_line([]) == ""
    assert passed_over_line(["v_head.weight"]) == "1 tensors of the checkpoint are not merged: v_head.weight\n"
