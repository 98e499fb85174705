"""Tests of `qlora-lite quantize`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

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
