"""Runs every example with its small setting; each ends with its JSON line.

They run in the process of the tests: in one of its own, each would spend more time on imports than on its task. What
they start themselves are forks (command_server.py).
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {
    "examples/quickstart.py": {
        "exact_match_before",
        "exact_match_after",
        "exports_agree",
        "peak_rss_bytes",
        "seconds",
    },
    "examples/finetune_4bit.py": {"first_loss", "last_loss", "adapter", "merged"},
    "examples/seed_layers.py": {"loss_before", "loss_after", "merged_difference", "restored"},
    "examples/name_colours.py": {
        "family",
        *("frozen", "frozen_before", "frozen_losses"),
        *("adapted", "adapted_before", "adapted_losses"),
    },
    "examples/several_adapters.py": {"losses", "base_unchanged"},
    "examples/classify.py": {"accuracy_before", "accuracy_after", "f1_after", "seconds", "difference_to_peft"},
    "examples/from_peft.py": {
        "peft_first_loss",
        "peft_last_loss",
        "first_loss",
        "last_loss",
        "difference_without",
        "difference_here",
        "difference_back",
    },
    "examples/trainer.py": {"first_loss", "last_loss", "adapter_bytes", "checkpoint_bytes", "resumed_equal"},
    "examples/sft_with_trl.py": {"loss_before", "loss_after", "loaded_equal", "adapter_bytes", "checkpoint_bytes"},
    "examples/dpo_with_trl.py": {"losses", "files"},
    "examples/peft_api.py": {"none", "yes", "no", "no, loaded", "no, merged"},
}
# Parts of the others, which are tested in tests/examples/ and by whoever uses them.
PARTS = {
    "examples/real_model.py",
    "examples/message_records.py",
    "examples/tiny_model.py",
    "examples/tiny_vision_model.py",
}


def test_no_example_is_forgotten() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py")}
    assert found == {*EXAMPLES, *PARTS}


@pytest.mark.parametrize("example", sorted(EXAMPLES))
def test_example_ends_with_its_figures(
    example: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command_server: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "executable", command_server.python)
    monkeypatch.setattr(sys, "argv", [example, "--tiny"])
    exit_code = None
    try:
        runpy.run_path(str(ROOT / example), run_name="__main__")
    except SystemExit as end:
        exit_code = end.code
    assert not exit_code
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(figures) == EXAMPLES[example]
    if "exports_agree" in figures:
        assert figures["exports_agree"] >= 0.5
    if "restored" in figures:
        assert figures["restored"] is True and figures["loss_after"] < figures["loss_before"]
    if "checkpoint_bytes" in figures:  # two states of the optimizer for each value of the adapter, and small files
        assert figures["checkpoint_bytes"] < 3 * figures["adapter_bytes"] + 60_000
    if "files" in figures:
        assert "adapter_model.safetensors" in figures["files"] and "model.safetensors" not in figures["files"]
