"""docs/architecture.md says how the rooms stand, and its two walks go down the floors and up again."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MOST_FILES = 15
LIBRARY = ["cProfile", "profiling", "compile"]  # of Python and torch


def floors() -> dict[str, int]:
    """FLOORS of tests/test_architecture.py, rooms written as folders; the ground left out."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    named = (node for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FLOORS")
    found: dict[str, int] = ast.literal_eval(next(named).value)  # type: ignore[arg-type]
    return {room.replace(".", "/"): floor for room, floor in found.items() if room}


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
