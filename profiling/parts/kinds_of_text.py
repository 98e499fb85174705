"""Kinds of text for `calibrated.py`, as records: Python's help texts, docstrings of the standard library, and chats."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

Record = dict[str, Any]

# Shorter docstrings say nothing.
LEAST_CHARACTERS = 200


def help_texts() -> list[Record]:
    """Returns the topics of Python's help."""
    return [{"text": topics[name]} for name in sorted(topics)]


def docstrings(most: int) -> list[Record]:
    """Returns docstrings of the standard library's modules, in the order of their files, at most so many."""
    found: list[Record] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        found += [{"text": text} for text in texts if text is not None and len(text) >= LEAST_CHARACTERS]
    return found[:: max(1, len(found) // most)][:most]


def chats(folder: Path) -> list[Record]:
    """Returns the exchanges of chatterbot-corpus (BSD). folder: its `chatterbot_corpus/data/english`."""
    found: list[Record] = []
    for path in sorted(folder.glob("*.yml")):
        turns: list[str] = []
        for line in [*path.read_text(encoding="utf-8").splitlines(), "- - end"]:
            if line.startswith("- - ") and len(turns) > 1:
                roles = ("user", "assistant")
                messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
                found.append({"messages": messages[: len(messages) // 2 * 2]})
            if line.startswith("- - "):
                turns = [_unquoted(line[4:])]
            elif line.startswith("  - ") and turns:
                turns.append(_unquoted(line[4:]))
    return found


def _unquoted(text: str) -> str:
    return text.strip().strip("'\"")


def halves(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Returns every other record, and the others: one half is calibrated on, the other is held out."""
    return records[::2], records[1::2]
