"""Tests of what is asked of the system, where it is there and where its absence is simulated."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

import pytest

from qlora_lite import system
from qlora_lite.system import c_function, missing, opens_folders, processor, user_cache


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
