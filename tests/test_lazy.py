"""Tests of names that a package imports on first use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FACE = """
from qlora_lite.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, {"first": "one two", "inner.second": "three"})
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "lazy_package"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text(FACE)
    (folder / "inner" / "__init__.py").write_text("")
    (folder / "first.py").write_text("one, two = 1, 2")
    (folder / "inner" / "second.py").write_text("three = [3]")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("lazy_package")]:
        monkeypatch.delitem(sys.modules, name)
    return "lazy_package"


def test_a_file_is_imported_when_one_of_its_names_is_read(package: str) -> None:
    face = __import__(package)
    assert not any(name.startswith(f"{package}.") for name in sys.modules)
    assert face.two == 2 and f"{package}.first" in sys.modules and f"{package}.inner.second" not in sys.modules
    assert face.three is face.three and vars(face)["three"] == [3]


def test_all_names_are_listed_and_others_are_refused(package: str) -> None:
    face = __import__(package)
    assert face.__all__ == ["one", "two", "three"] and {"one", "two", "three", "__all__"} <= set(dir(face))
    with pytest.raises(AttributeError, match="module 'lazy_package' has no attribute 'four'"):
        _ = face.four
