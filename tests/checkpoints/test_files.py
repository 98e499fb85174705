"""Opening files of strangers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_lite.checkpoints.files import excerpt, is_regular, open_regular, read_json
from qlora_lite.errors import CheckpointError


def test_a_regular_file_is_opened_and_a_link_to_one_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    for name in "ab":
        with open_regular(tmp_path / name, "text", 3) as file:
            assert file.read() == b"abc"
        assert is_regular(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"a has 3 bytes; expected text, of at most 2"):
        open_regular(tmp_path / "a", "text", 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipe", r"pipe is a pipe, socket or device; expected a JSON file"),
        ("zero", r"zero is a pipe, socket or device"),
        ("folder", r"folder is a folder; expected"),
        ("loop", r"cannot read .*: Too many levels of symbolic links; expected"),
        ("lost", r"lost does not exist; expected"),
        ("x" * 5000, r"cannot read .*\.\.\.: File name too long; expected a JSON file"),
        ("a\0b", r"cannot read .*: .*null"),
    ],
)
def test_all_else_is_one_sentence_and_is_never_waited_for(name: str, message: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    assert not is_regular(tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        open_regular(tmp_path / name, "a JSON file")


def test_an_excerpt_is_short() -> None:
    assert excerpt("a" * 100) == "'" + "a" * 56 + "..." and excerpt([1]) == "[1]"


def test_damaged_json_gets_one_sentence(tmp_path: Path) -> None:
    for text, message in (
        ("[1]", "JSON object"),
        ("{", "cannot be read as JSON"),
        ('{"r": ' + 5000 * "9" + "}", "cannot be read as JSON: Exceeds the limit"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_json(tmp_path / "x.json")
