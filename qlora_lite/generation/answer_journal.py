"""The answers that are finished, next to the file that they will be in: what a killed process leaves to the next one.

The first line says what is answered, by which model and how. Each other line is an answer with the number of its
prompt. Lines are appended a batch at a time and synced. A line that a kill or a full disk cut is dropped when the
journal is opened again.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qlora_lite.checkpoints.files import UNFINISHED, open_regular, sync
from qlora_lite.checks import is_count
from qlora_lite.data.sources.raw import LONGEST_LINE
from qlora_lite.errors import CheckpointError, listing

VERSION = 1
NUMBER = "number"
MOST_SHOWN = 6
# Entries of the first line of which each difference is told.
DETAILED = ("settings", "machine")

Header = Mapping[str, object]


def journal_path(output: Path) -> Path:
    """The journal of an output file."""
    return output.with_name(f"{output.name}{UNFINISHED}")


def read_header(path: Path) -> dict[str, Any] | None:
    """Returns what the journal says of its run; None if there is no journal, or a kill left no whole line of it.

    Raises CheckpointError for a file that is no journal.
    """
    if not path.exists():
        return None
    with open_regular(path, "unfinished answers") as file:
        line = file.readline(LONGEST_LINE)
    if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
        return None
    return _object(line, path, 1)


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}, line {number} is damaged; remove the file to begin anew")
    return found


def run_date(output: Path) -> datetime.date | None:
    """The date that prompts hold in the run that an output's journal is of; None if it says none, or there is none."""
    date = (read_header(journal_path(output)) or {}).get("date")
    try:
        return None if date is None else datetime.date.fromisoformat(str(date))
    except ValueError:
        return None


@contextmanager
def open_journal(path: Path, header: Header, anew: bool = False) -> Iterator[AnswerJournal]:
    """Opens a journal, or begins one. anew: also if it is that of another run.

    Raises CheckpointError, with what differs, for the journal of another run, and for a damaged one.
    """
    # As it is read from the file: tuples are lists there.
    own: dict[str, Any] = json.loads(json.dumps({"version": VERSION, **header}, default=str))
    stored = read_header(path)
    differences = [] if stored is None else _differences(stored, own)
    if differences and not anew:
        raise CheckpointError(
            f"{path} holds unfinished answers of another run: {listing(differences, MOST_SHOWN, '; ')}; restore "
            f"these, or begin anew with overwrite"
        )
    goes_on = stored is not None and not differences
    places, end = _places(path) if goes_on else ({}, 0)
    with open(path, "r+b" if goes_on else "w+b") as file:
        file.truncate(end)
        journal = AnswerJournal(path, file, places)
        if not goes_on:
            journal.append([own])
            sync(path.parent)
        yield journal


def _places(path: Path) -> tuple[dict[int, tuple[int, int]], int]:
    """Returns the place and the length of each answer by the number of its prompt, and where the last whole line ends.

    Raises CheckpointError for a line that is whole and is no answer.
    """
    places: dict[int, tuple[int, int]] = {}
    end, number = 0, 0
    with open_regular(path, "unfinished answers") as file:
        while (line := file.readline(LONGEST_LINE)).endswith(b"\n"):
            number += 1
            found = _object(line, path, number)
            if number > 1:
                if not is_count(found.get(NUMBER), 0):
                    raise CheckpointError(f"{path}, line {number} is damaged; remove the file to begin anew")
                places[found[NUMBER]] = (end, len(line))
            end += len(line)
    return places, end


class AnswerJournal:
    """An open journal."""

    def __init__(self, path: Path, file: BinaryIO, places: dict[int, tuple[int, int]]) -> None:
        self._path, self._file, self._places = path, file, places

    @property
    def done(self) -> Set[int]:
        """The numbers of the prompts that are answered."""
        return self._places.keys()

    def add(self, answers: Mapping[int, Mapping[str, object]]) -> None:
        """Appends answers by the numbers of their prompts, and syncs them to the disk."""
        self.append([{NUMBER: number, **answer} for number, answer in answers.items()], list(answers))

    def append(self, values: Sequence[Header], numbers: Sequence[int] = ()) -> None:
        """Appends lines and syncs them. numbers: of the prompts that they answer."""
        lines = [json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for value in values]
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        for number, line in zip(numbers, lines, strict=False):
            self._places[number] = (place, len(line))
            place += len(line)

    def answer(self, number: int) -> dict[str, object]:
        """Returns an answer that the journal has."""
        place, length = self._places[number]
        self._file.seek(place)
        found = _object(self._file.read(length), self._path, number)
        return {key: value for key, value in found.items() if key != NUMBER}


def _differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Sentences about what is not the same, entry by entry."""
    found = []
    for key in sorted({*stored, *own}):
        before, now = stored.get(key), own.get(key)
        if before == now:
            continue
        if key in DETAILED and isinstance(before, dict) and isinstance(now, dict):
            found += [
                f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
                for name in sorted({*before, *now})
                if before.get(name) != now.get(name)
            ]
        else:
            found.append(f"the {key} differ{'' if key.endswith('s') else 's'}")
    return found
