"""Tests of opening untrusted files, checking output paths, and writing single files atomically."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest

from qlora_lite.checkpoints.files import (
    check_creatable,
    check_writable,
    did_you_mean,
    excerpt,
    is_companion_name,
    is_regular,
    new_file,
    open_regular,
    read_json,
    rename,
    similar_paths,
    sync,
    write_json,
)
from qlora_lite.errors import CheckpointError, ConfigError


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


def test_what_is_there_and_what_can_be_made_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "ahead").symlink_to(tmp_path / "new")
    for name in ("there", "link", "link/new", "ahead", "new/below/it", "x" * 230):
        check_creatable(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    check_creatable(Path("new"))
    check_creatable(Path("/"))
    assert sorted(os.listdir(tmp_path)) == ["ahead", "link", "there"]


def test_each_reason_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "new")
    wrong = {
        "file/new": f"{tmp_path / 'file'} is not a folder that may be written to",
        "circle": "Too many levels of symbolic links",
        "circle/new": "Too many levels of symbolic links",
        "dangling": f"{tmp_path / 'file'} is not a folder that may be written to",
        "x" * 300: "File name too long",
        "x" * 250: "File name too long",  # which is that of what stands beside it until it is whole
        "new\0": "null",
    }
    for name, sentence in wrong.items():
        with pytest.raises(CheckpointError) as refused:
            check_creatable(tmp_path / name)
        assert sentence in str(refused.value), name


def test_simulated_a_drive_that_is_missing_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    with pytest.raises(CheckpointError, match="is not a folder that may be written to"):
        check_creatable(Path("Z:/new"))


def test_simulated_a_rename_waits_for_a_scanner_but_not_for_a_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals, waited = [32, 5], []
    replace = os.replace

    def busy(source: Path, target: Path) -> None:
        if refusals:
            error = PermissionError(errno.EACCES, "Access is denied", str(source))
            if number := refusals.pop(0):
                error.winerror = number  # type: ignore[attr-defined]
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(time, "sleep", waited.append)
    (tmp_path / "a").touch()
    rename(tmp_path / "a", tmp_path / "b")
    assert len(waited) == 2 and (tmp_path / "b").is_file()
    for always, times in (([5] * 99, 5), ([0], 0)):
        refusals, waited[:] = always, []
        with pytest.raises(PermissionError):
            rename(tmp_path / "b", tmp_path / "c")
        assert len(waited) == times and sum(waited) < 2


def test_simulated_where_no_folder_is_opened_only_files_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    flushed: list[os.stat_result] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor)))
    for path in (tmp_path, tmp_path / "a"):
        sync(path)
    assert [stat.S_ISDIR(state.st_mode) for state in flushed] == [True, False]
    monkeypatch.delattr(os, "O_DIRECTORY")
    for path in (tmp_path, tmp_path / "a"):
        sync(path)
    assert [stat.S_ISDIR(state.st_mode) for state in flushed] == [True, False, False]
    assert (tmp_path / "a").read_bytes() == b"abc"


def test_simulated_json_has_the_same_line_ends_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "linesep", "\r\n")
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_bytes() == b'{\n  "a": 1\n}\n'


def test_a_file_appears_whole_and_beside_it_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "page.html"
    with new_file(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it" and list(path.parent.iterdir()) == [path]
    usual = tmp_path / "usual"
    usual.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "page.html"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), new_file(path, overwrite=True) as file:
        file.write(b"half")
        file.flush()
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with new_file(path, overwrite=True) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_behind_a_link_stands_the_file_that_is_meant(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_file(tmp_path / "link") as file:
        file.write(b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"x"


def test_a_disk_that_refuses_is_one_of_our_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"page\.html cannot be written: "), new_file(tmp_path / "page.html"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    there = tmp_path / "there.html"
    there.touch()
    (tmp_path / "folder.html").mkdir()
    check_writable(tmp_path / "new" / "page.html", ".html", overwrite=False)
    check_writable(there, ".html", overwrite=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match=r"there\.html exists; name another file, or ask for overwrite"):
        check_writable(there, ".html", overwrite=False)
    with pytest.raises(CheckpointError, match=r"folder\.html is a folder; name a file"):
        check_writable(tmp_path / "folder.html", ".html", overwrite=True)
    with pytest.raises(ConfigError, match=r"the file must be named \*\.png; got .*page\.html"):
        check_writable(tmp_path / "page.html", ".png", overwrite=False)
    with pytest.raises(CheckpointError, match=r"there\.html is not a folder that may be written to"):
        check_writable(there / "page.html", ".html", overwrite=False)
    with pytest.raises(CheckpointError, match=r"there\.html exists"), new_file(there):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"is not a folder that may be written to"):
        check_writable(tmp_path / "page.html", ".html", overwrite=False)


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.html")
    with pytest.raises(CheckpointError, match="is a pipe, socket or device, which would be replaced"):
        check_writable(tmp_path / "a.html", ".html", overwrite=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, True) for name in ("tokenizer.json", "tekken.json", "chat_template.jinja", "qwen.tiktoken")),
        *((name, True) for name in ("spiece.model", "tokenizer.model.v3", "tokenizer.model.v7m1", "vocab.txt")),
        *((name, True) for name in ("LICENSE", "License.md", "gemma_LICENSE.txt", "NOTICE", "USE_POLICY.md")),
        *((name, False) for name in (".hidden.json", "README.md", "notes.txt", "modeling.py", "LICENSE.py")),
        *((name, False) for name in ("pytorch_model.bin", "model.safetensors", "state.pkl", "license_plate.png")),
    ],
)
def test_companion_files_are_told_by_their_names(name: str, expected: bool) -> None:
    assert is_companion_name(name) is expected


def test_similar_names_are_told_for_one_that_does_not_exist(tmp_path: Path) -> None:
    for name in ("runs/messages/x", "runs/massage", "other/message"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/mesagges").touch()
    runs = tmp_path / "runs"
    assert similar_paths(runs / "mesages", Path.is_dir) == [runs / "messages", runs / "massage"]
    for wrong in (runs, tmp_path / "rums"):
        assert {*similar_paths(wrong / "mesages")} == {runs / "messages", runs / "mesagges", runs / "massage"}
    assert similar_paths(tmp_path / "nowhere/messages") == [] == similar_paths(runs / "zzz") == similar_paths("/")
    assert did_you_mean(tmp_path / "othre" / "message") == f"; did you mean {tmp_path}/other/message?"
    assert did_you_mean("/nowhere/at/all") == ""
    with pytest.raises(
        CheckpointError, match=r"/dota\.jsonl does not exist; expected x; did you mean \S+/data\.jsonl\?$"
    ):
        (tmp_path / "data.jsonl").touch()
        open_regular(tmp_path / "dota.jsonl", "x")
