"""Where something can be made, and each reason why not; nothing is made by asking."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_lite.checkpoints.files import check_place
from qlora_lite.errors import CheckpointError


def test_what_is_there_and_what_can_be_made_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "ahead").symlink_to(tmp_path / "new")
    for name in ("there", "link", "link/new", "ahead", "new/below/it", "x" * 230):
        check_place(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    check_place(Path("new"))
    check_place(Path("/"))
    assert sorted(os.listdir(tmp_path)) == ["ahead", "link", "there"]


def test_each_reason_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "new")
    wrong = {
        "file/new": f"{tmp_path / 'file'} is no folder that may be written to",
        "circle": "Too many levels of symbolic links",
        "circle/new": "Too many levels of symbolic links",
        "dangling": f"{tmp_path / 'file'} is no folder that may be written to",
        "x" * 300: "File name too long",
        "x" * 250: "File name too long",  # which is that of what stands beside it until it is whole
        "new\0": "null",
    }
    for name, sentence in wrong.items():
        with pytest.raises(CheckpointError) as refused:
            check_place(tmp_path / name)
        assert sentence in str(refused.value), name
