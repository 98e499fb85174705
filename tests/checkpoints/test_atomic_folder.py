"""Tests of writing a folder atomically, and of replacing another folder in one rename."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from qlora_lite.checkpoints import atomic_folder
from qlora_lite.checkpoints.atomic_folder import LOCK_FILE, check_output_is_not_input, exchange_names, new_folder
from qlora_lite.errors import CheckpointError
from qlora_lite.system import locked


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_two_folders_trade_places_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (one / "first").touch()
    with pytest.raises(FileNotFoundError):
        exchange_names(one, other)
    other.mkdir()
    assert exchange_names(one, other)
    assert [path.name for path in other.iterdir()] == ["first"] and not list(one.iterdir())


def test_new_folder_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(KeyError), new_folder(target) as folder:
        (folder / "half").write_text("x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "whole.json").write_text("x")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~umask
    with pytest.raises(CheckpointError, match="not empty"), new_folder(target):
        pass
    with new_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [path.name for path in target.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [target]
    with pytest.raises(CheckpointError, match="would be lost: new"), new_folder(target, overwrite=True):
        pass


@pytest.mark.parametrize("system", [atomic_folder.exchange_names, lambda one, other: False])
def test_what_is_replaced_is_there_until_the_new_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: Callable[[Path, Path], bool]
) -> None:
    monkeypatch.setattr(atomic_folder, "exchange_names", system)
    for text in ("1", "2"):
        with new_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "x.json").write_text(text)
    assert (tmp_path / "out" / "x.json").read_text() == "2" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not(tmp_path: Path) -> None:
    for name in (".out.old1.partial", ".out.held1.partial", ".out.new1.partial", ".other.old1.partial"):
        (tmp_path / name).mkdir()
    for name in (".out.old1.partial", ".out.held1.partial", ".other.old1.partial"):
        (tmp_path / name / "new").mkdir()
        (tmp_path / name / "new" / "half").touch()
        (tmp_path / name / LOCK_FILE).touch()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".out.file1.partial").touch()
    os.utime(tmp_path / ".out.file1.partial", (0, 0))
    with locked(tmp_path / ".out.held1.partial" / LOCK_FILE):
        os.utime(tmp_path / ".out.held1.partial", (0, 0))
        with new_folder(tmp_path / "out"):
            pass
    (tmp_path / ".out.file1.partial").unlink()
    left = [".other.old1.partial", ".out.held1.partial", ".out.new1.partial", "out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_one_that_is_written_is_locked_until_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_folder, "ABANDONED_AFTER_SECONDS", -1)
    rename, tried = atomic_folder._rename_over, []

    def meanwhile(temporary: Path, target: Path) -> None:
        atomic_folder.remove_abandoned_folders(tmp_path, ".out.*")
        tried.append(temporary.is_dir())
        rename(temporary, target)

    monkeypatch.setattr(atomic_folder, "_rename_over", meanwhile)
    with new_folder(tmp_path / "out") as folder:
        atomic_folder.remove_abandoned_folders(tmp_path, ".out.*")
        (folder / "x.json").touch()
    assert tried == [True] and [path.name for path in tmp_path.rglob("*")] == ["out", "x.json"]


def test_what_another_user_left_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".out.old1.partial").mkdir()
    os.utime(tmp_path / ".out.old1.partial", (0, 0))
    lock = atomic_folder.locked

    def refused(path: Path) -> AbstractContextManager[Callable[[], bool]]:
        if path.parent.name == ".out.old1.partial":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return lock(path)

    monkeypatch.setattr(atomic_folder, "locked", refused)  # the tests run as root
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.old1.partial", "out"]


def test_without_an_exchange_a_failed_replacement_puts_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = atomic_folder.rename

    def refused(source: Path, target: Path) -> None:
        if source.name == "new":
            raise PermissionError(errno.EACCES, "Access is denied", str(source))
        rename(source, target)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.json").write_text("old")
    monkeypatch.setattr(atomic_folder, "exchange_names", lambda one, other: False)
    monkeypatch.setattr(atomic_folder, "rename", refused)
    said = pytest.raises(CheckpointError, match="out cannot be written: Access is denied")
    with said, new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "x.json").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "x.json"]
    assert (tmp_path / "out" / "x.json").read_text() == "old"


def test_what_another_one_wrote_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    refused = pytest.raises(CheckpointError, match="not empty")
    with refused, new_folder(tmp_path / "out"), new_folder(tmp_path / "out") as first:
        (first / "config.json").write_text("first")
    assert (tmp_path / "out" / "config.json").read_text() == "first"
    with pytest.raises(CheckpointError, match="would be lost: notes"), new_folder(tmp_path / "out", overwrite=True):
        (tmp_path / "out" / "notes").write_text("mine")
    assert (tmp_path / "out" / "notes").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_the_folder_hands_its_parents_group_on(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    with new_folder(tmp_path / "out"):
        pass
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_behind_a_link_the_folder_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for link, target in (("link", "real"), ("dangling", "later")):
        (tmp_path / link).symlink_to(target)
        with new_folder(tmp_path / link) as folder:
            (folder / "x.json").write_text("{}")
        assert (tmp_path / link).is_symlink() and (tmp_path / target / "x.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "later", "link", "real"]


def test_an_output_over_an_input_is_refused(tmp_path: Path) -> None:
    check_output_is_not_input(tmp_path / "out", tmp_path / "base", None)
    with pytest.raises(CheckpointError, match="would replace the input"):
        check_output_is_not_input(tmp_path, tmp_path / "base")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "model.safetensors").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(tmp_path / "store" / "model.safetensors")
    with pytest.raises(CheckpointError, match="store would replace the input"):
        check_output_is_not_input(tmp_path / "store", tmp_path / "linked")
