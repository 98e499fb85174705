"""docs/architecture.md says how the rooms stand, and its two walks go down the floors and up again."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MOST_FILES = 15
LIBRARY = ["cProfile", "profiling", "compile"]  # of Python and torch


def constant(name: str) -> Any:
    """A constant of tests/test_architecture.py."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    for node in tree.body:
        target = (
            node.target
            if isinstance(node, ast.AnnAssign)
            else node.targets[0]
            if isinstance(node, ast.Assign)
            else None
        )
        if isinstance(target, ast.Name) and target.id == name:
            return ast.literal_eval(node.value)  # type: ignore[union-attr,arg-type]
    raise AssertionError(f"tests/test_architecture.py has no {name}")


def floors() -> dict[str, int]:
    """The floor of each room, rooms written as folders; the ground left out."""
    return {room.replace(".", "/"): floor for room, floor in constant("FLOORS").items() if room}


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def walk(title: str) -> list[list[str]]:
    """The files of each numbered line of a section."""
    lines = re.findall(r"^\d+\. (.*)$", section(title), re.MULTILINE)
    return [re.findall(r"`([\w/]+\.py)`", line.partition(": ")[0]) for line in lines]


def test_table_of_rooms_is_that_of_the_architecture_tests() -> None:
    rows = re.findall(r"^\| (\d+) \| (`.*?`) \|", section("Rooms and floors"), re.MULTILINE)
    assert {room: int(floor) for floor, rooms in rows for room in re.findall(r"`([\w/]+)`", rooms)} == floors()


def test_names_that_the_page_quotes_are_in_the_source() -> None:
    prose = re.sub(r"^```.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    quoted = re.findall(r"`([A-Za-z_][\w.]*)`", prose)
    names = {name.rpartition(".")[2] for name in quoted if not name.endswith(".py")} - set(LIBRARY)
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "qlora_lite").rglob("*.py"))
    assert {name for name in names if not re.search(rf"\b{name}\b", source)} == set()


def test_libraries_are_imported_by_the_files_that_the_page_names() -> None:
    rows = re.findall(r"^\| (\w+) \| (.*\.py`) \|$", section("Rooms and floors"), re.MULTILINE)
    named = {library: set(re.findall(r"`([\w/]+)\.py`", files)) for library, files in rows}
    kept = constant("KEEPERS")
    assert named == {library: {file.replace(".", "/") for file in files} for library, files in kept.items()}


@pytest.mark.parametrize("title", ["The way of one weight", "The way of one batch"])
def test_walks_go_down_and_then_up(title: str) -> None:
    steps = walk(title)
    assert all(steps)
    files = [file for step in steps for file in step]
    assert 10 <= len(files) <= MOST_FILES
    stands = floors()
    levels = [stands[str(Path(file).parent)] for file in files]
    lowest = levels.index(min(levels))
    assert all(one >= other for one, other in itertools.pairwise(levels[: lowest + 1]))
    assert all(one <= other for one, other in itertools.pairwise(levels[lowest:]))
