"""Tests of one revision for one piece of work, by the real client of the hub from a stand-in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.checkpoints.hub import checkpoint_folder, load_tokenizer
from qlora_lite.checkpoints.repository.revisions import hub_asked_once
from qlora_lite.cli.main import main

ASKED = "GET /api/models/org/tiny"


@pytest.fixture
def published(stand_in_hub: Any, import_script: Any, tiny_folder: Path) -> Any:
    """The stand-in with the checkpoint `org/tiny`."""
    files = {path.name: path.read_bytes() for path in tiny_folder.iterdir() if path.is_file()}
    stand_in_hub.repositories["org/tiny"] = import_script("tests/stand_in_hub.py").Repository(files)
    return stand_in_hub


def test_within_the_block_one_revision_is_used(published: Any) -> None:
    with hub_asked_once():
        folder = checkpoint_folder("org/tiny", weights=False)
        published.repositories["org/tiny"].commit = "2" * 40
        assert load_tokenizer("org/tiny").pad_token_id is not None
        assert checkpoint_folder("org/tiny") == folder and (folder / "model.safetensors").is_file()
        assert published.requests.count(ASKED) == 1
        with hub_asked_once():
            assert checkpoint_folder("org/tiny", weights=False).name == "2" * 40
        assert checkpoint_folder("org/tiny") == folder
    assert checkpoint_folder("org/tiny", weights=False).name == "2" * 40


def test_without_a_network_the_cache_is_asked_once_too(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, constants

    folder = checkpoint_folder("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = []
    monkeypatch.setattr(HfApi, "model_info", lambda *_: asked.append(1) or (_ for _ in ()).throw(OSError("no network")))
    with hub_asked_once():
        assert [checkpoint_folder("org/tiny"), checkpoint_folder("org/tiny", weights=False)] == [folder] * 2
    assert asked == [1]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--data", "data.jsonl", "--output", "run", "--steps", "1", "--rank", "2", "--memory-budget", "8GiB"],
        ["init", "--data", "data.jsonl", "--memory", "8GiB", "--epochs", "1", "--output", "out", "--yes"],
        ["generate", "--prompts", "data.jsonl", "--output", "answers.jsonl", "--max-new-tokens", "1"],
    ],
)
def test_a_command_asks_once(published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n}", "completion": "a"}) for n in range(4)))
    monkeypatch.setattr(sys, "argv", ["qlora-lite", *words, "--model", "org/tiny"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and published.requests.count(ASKED) == 1
    if words[0] == "train":
        adapter = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == "org/tiny"
        assert "\nmodel: org/tiny\n" in (tmp_path / "run/run.yaml").read_text()
