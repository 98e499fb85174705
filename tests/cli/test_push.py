"""Tests of `qlora-lite push`: what it prints, before it uploads and after, and its one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.cli.main import app
from qlora_lite.errors import CheckpointError


def push(*words: object) -> None:
    app(["push", *map(str, words)], standalone_mode=False)


def test_it_lists_what_goes_up_and_prints_address_and_commit(
    stand_in_hub: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be pushed to me/tiny: there is no token; log in with"):
        push(tiny_folder, "me/tiny")
    assert capsys.readouterr().out.splitlines()[0] == f"{tiny_folder}: checkpoint, 6 files"
    assert not stand_in_hub.requests
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    push(tiny_folder, "me/tiny", "--private", "--revision", "trial")
    there = stand_in_hub.repositories["me/tiny"]
    lines = capsys.readouterr().out.splitlines()
    assert there.private and {line.split()[0] for line in lines[1:7]} == {*there.branches["trial"]}
    assert lines[7:] == [
        "repository  me/tiny",
        f"address     {stand_in_hub.address}/me/tiny",
        "revision    trial",
        f"commit      {there.commit}",
    ]
    push(tiny_folder, "me/tiny", "--json")
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["kind"] == "checkpoint" and {*figures["files"]} == {*there.files} and figures["bytes"] > 0


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing is not a folder; name that of an adapter or of a checkpoint"):
        push(tmp_path / "nothing", "me/x")
