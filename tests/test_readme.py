"""Runs the example of the README on a small model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def python_example() -> str:
    blocks: list[str] = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M
    )
    assert len(blocks) == 1, "README.md should have one Python example"
    return blocks[0]


def test_example_trains_and_exports_a_checkpoint(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    from tiny_model import make_tiny_model

    monkeypatch.chdir(memory_path)
    make_tiny_model(memory_path / "path" / "to" / "model")
    lines = [{"prompt": f"what is {n}", "completion": f"it is {n}"} for n in range(8)]
    (memory_path / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    names: dict[str, object] = {}
    exec(compile(python_example(), "README.md", "exec"), names)
    assert len(names["result"].losses) == 4  # type: ignore[attr-defined]
    exported = AutoModelForCausalLM.from_pretrained("out/merged", dtype=torch.float32)
    trained = names["model"]
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        difference = (exported(tokens).logits - trained(tokens).logits.float()).abs().max()  # type: ignore[operator]
    assert difference < 0.05


def test_example_has_fifteen_lines_or_so() -> None:
    assert len([line for line in python_example().splitlines() if line.strip()]) <= 17


def test_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
