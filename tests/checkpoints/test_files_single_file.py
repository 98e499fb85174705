from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from qlora_lite.checkpoints.files import check_writable, new_file
from qlora_lite.errors import CheckpointError, ConfigError


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
    with pytest.raises(CheckpointError, match=r"there\.html is no folder that may be written to"):
        check_writable(there / "page.html", ".html", overwrite=False)
    with pytest.raises(CheckpointError, match=r"there\.html exists"), new_file(there):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"is no folder that may be written to"):
        check_writable(tmp_path / "page.html", ".html", overwrite=False)


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.html")
    with pytest.raises(CheckpointError, match="is a pipe, socket or device, which would be replaced"):
        check_writable(tmp_path / "a.html", ".html", overwrite=True)
