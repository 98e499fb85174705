"""Tests of `qlora-lite quantize`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_quantize_writes_what_the_other_commands_read(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    from qlora_lite import QuantConfig, load_quantized

    words = ("quantize", "--model", tiny_folder, "--output", tmp_path / "q", "--format", "fp4", "--no-double-quant")
    done = run(*words, "--max-shard-size", "20kB", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    sizes = [(tmp_path / "q" / file).stat().st_size for file in figures["files"]]
    assert figures["bytes"] == sum(sizes) and len(sizes) > 1
    expected = load_quantized(tiny_folder, QuantConfig("fp4", double_quant=False)).state_dict()
    held = load_quantized(tmp_path / "q").state_dict()
    assert held.keys() == expected.keys() and all(torch.equal(held[name], value) for name, value in expected.items())
    done = run("profile", "--model", tmp_path / "q", "--rank", 2, "--rows", 1, "--tokens", 16)
    assert done.returncode == 2 and "is packed as fp4 already; format 'nf4' was asked for" in done.stderr
    again = run(*words)
    assert again.returncode == 1 and "not empty" in again.stderr


def test_what_stays_unpacked_or_is_passed_over_is_printed(
    run: Run, small_model: Callable[..., Any], tmp_path: Path
) -> None:
    small_model("MambaConfig", state_size=8).save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file({**tensors, "v_head.weight": torch.ones(1, 32)}, tmp_path / "m" / "model.safetensors")
    words = ("quantize", "--model", tmp_path / "m", "--output", tmp_path / "q", "--format", "int8")
    done = run(*words)
    assert (
        done.returncode == 1 and "1 tensors belong to no module: v_head.weight; ignore_unexpected (--i" in done.stderr
    )
    done = run(*words, "--ignore-unexpected")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "  2 x backbone.layers.*.mixer.dt_proj: MambaMixer.forward reads its weight" in lines
    assert lines[2:4] == ["1 tensors of the checkpoint are not part of the model:", "  1 x v_head.weight: passed over"]


def test_text_chooses_the_codes(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"the number {number} is {number * number} if it is squared"}) for number in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    words = ("quantize", "--model", tiny_folder, "--output", tmp_path / "q", "--calibrate", tmp_path / "text.jsonl")
    done = run(*words, "--calibration-tokens", 1024, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["tokens"] == 1024 and figures["layers_calibrated"] == 14 and figures["layers_rounded"] == 0
    assert figures["kl_calibrated"] < figures["kl_rounded"] and figures["mean_error_ratio"] < 0.7
    assert "times as far from the 16-bit one as rounding" in done.stdout
    noted = json.loads((tmp_path / "q" / "calibration.json").read_text())
    assert noted["held_out"]["kl"]["calibrated"] == figures["kl_calibrated"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "text.jsonl"]  # no cache of tokens
    done = run(*words, "--format", "int8", "--overwrite")
    assert done.returncode == 2 and "calibration chooses codes of nf4 or fp4" in done.stderr
    done = run(*words[:5], "--calibration-tokens", 1024, "--overwrite")
    assert done.returncode == 2 and "give --calibrate too" in done.stderr
