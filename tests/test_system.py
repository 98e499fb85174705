"""Tests of what is asked of the system, where it is there and where its absence is simulated, and of locks on files."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from qlora_lite import system
from qlora_lite.system import RECORD_BYTES, c_function, is_locked, locked, missing, opens_folders, processor, user_cache

HOLD = """
import sys, time
from pathlib import Path
from qlora_lite.system import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_function_of_the_c_library_is_found_by_its_name() -> None:
    getpid = c_function("getpid")
    assert getpid is not None and getpid() == os.getpid()
    assert c_function("no_such_function_anywhere") is None


def test_simulated_a_system_without_such_a_library_has_no_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_windows(name: str | None, **options: object) -> None:
        raise TypeError(f"argument of type {type(name).__name__!r} is not iterable")

    monkeypatch.setattr(ctypes, "CDLL", as_on_windows)
    assert c_function("getpid") is None


def test_the_cache_folder_is_the_users_or_the_usual_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path))
    assert user_cache() == tmp_path
    monkeypatch.setenv("QLORA_LITE_CACHE", "")
    assert user_cache() == Path.home() / ".cache" / "qlora_lite"


def test_a_processor_has_a_name_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    name = processor()
    assert name and name == processor()
    if sys.platform == "linux" and "model name" in Path("/proc/cpuinfo").read_text():
        assert "(cpu family " in name and ", model " in name

    def missing_file(self: Path, **options: object) -> str:
        raise FileNotFoundError(2, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "read_text", missing_file)
    assert processor() in (platform.processor(), platform.machine())


def test_a_folder_is_opened_where_it_can_be(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path, os.O_RDONLY))
    except PermissionError:
        assert not opens_folders()
    else:
        assert opens_folders()


@pytest.mark.skipif(sys.platform != "linux", reason="takes from Linux what others lack")
def test_simulated_what_is_missing_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = missing()
    assert not any("O_DIRECTORY" in name or "O_DIRECT)" in name for name in before)
    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(system, "O_DIRECT", 0)
    monkeypatch.setattr(system, "CLEAR_REFS_FILE", str(tmp_path / "clear_refs"))
    monkeypatch.setattr(system, "c_function", lambda name: None)
    names = ("clear_refs", "mallopt", "O_DIRECT", "renameat2", "O_DIRECTORY")
    assert [name.rpartition("(")[2].rstrip(")") for name in missing()] == list(names)


def test_a_killed_process_holds_nothing_and_a_living_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError) as refused, locked(path):
            pass
        assert refused.value.strerror == f"process {other.pid}" and path.is_file()
        other.send_signal(signal.SIGKILL)
    assert path.is_file()
    with locked(path) as is_there:
        assert is_there()
    assert list(tmp_path.iterdir()) == []


def test_one_process_does_not_hold_a_lock_twice_and_its_files_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_bytes(b"9" * RECORD_BYTES)  # of an owner with a longer number, who was killed
    before = os.listdir("/dev/fd")
    for _ in range(2):
        with locked(path), pytest.raises(BlockingIOError, match=rf"process {os.getpid()}'?:"), locked(path):
            pass
    assert os.listdir("/dev/fd") == before and not path.exists()


def test_the_byte_that_windows_locks_is_not_read(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"), open(tmp_path / "lock", "rb") as file:
        file.seek(system.LOCKED_BYTES)
        assert file.read().strip() == b"%d" % os.getpid()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_file_that_went_is_noticed_and_another_ones_is_not_removed(tmp_path: Path, is_replaced: bool) -> None:
    path = tmp_path / "lock"
    with locked(path) as is_there:
        path.unlink()
        if is_replaced:
            path.write_text("another's")
        assert not is_there()
    assert path.exists() == is_replaced


def test_simulated_where_an_open_file_is_not_removed_it_is_closed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def as_on_windows(path: Path, missing_ok: bool = False) -> None:
        is_open = any(os.path.realpath(f"/dev/fd/{number}") == str(path) for number in os.listdir("/dev/fd"))
        if is_open:
            raise PermissionError(errno.EACCES, "Access is denied", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", as_on_windows)
    path = Path(os.path.realpath(tmp_path)) / "lock"
    with locked(path):
        pass
    assert not path.exists()
    with open(path, "wb"), locked(path):  # another process is asking for it just now
        pass
    assert path.exists()


def test_simulated_a_file_system_without_locks_is_named_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(descriptor: int, *, blocking: bool) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock, "lock_descriptor", without)
    with pytest.raises(OSError, match=r"its file system gives no lock \(No locks available\)"), locked(tmp_path / "x"):
        pass


def test_whether_another_process_holds_a_lock_is_seen_without_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path) and not path.exists()
    with locked(path):
        assert is_locked(path)
    path.write_bytes(b"9" * RECORD_BYTES)  # left by a killed process
    assert not is_locked(path) and path.exists()
    with locked(path):
        pass
