"""Records of training data: renamed, checked, and the bad ones listed.

    raw_records(source) -> checked_records(...) -> what each record contains -> tokenization

A record is a JSON object, or a row of a table, of one of the shapes in shapes.py. A set may mix the shapes.
"""

from __future__ import annotations

import datetime
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from qlora_lite.checkpoints.files import excerpt
from qlora_lite.checks import require
from qlora_lite.data.encoding import Draft, Marked
from qlora_lite.data.shapes import KEYS, Answered, Content, Record, Shape, shape_of, unused_keys
from qlora_lite.data.sources.raw import RawRecord
from qlora_lite.data.sources.source import Source, raw_records
from qlora_lite.errors import CheckpointError, listing

# So many bad records are kept with their reasons. All are counted.
MOST_KEPT = 10_000
MOST_REASONS, MOST_PLACES = 20, 8

Drafted = tuple[str, "list[Draft] | Marked | str"]  # the place of a record, and its texts, its tokens, or why it is bad
FindShape = Callable[[Record, str], Shape]


class CheckedRecord(NamedTuple):
    """What a record contains, or why it is bad."""

    place: str
    content: Content | Answered | None
    error: str | None


class RecordEncoder(Protocol):
    """What turns the contents of records into tokens."""

    @property
    def date_written(self) -> datetime.date | None: ...
    def drafts(self, content: Any) -> list[Any] | Marked: ...
    def tokens(self, drafts: Sequence[Draft]) -> list[Marked]: ...
    def cut_images(self, examples: Sequence[Marked], max_length: int | None) -> str | None: ...


@dataclass
class BadRecords:
    """The records that cannot be learned from. allowed: as many are left out, and more are an error."""

    allowed: int = 0
    count: int = 0
    kept: list[tuple[str, str]] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """Notes one bad record."""
        self.count += 1
        if len(self.kept) < MOST_KEPT:
            self.kept.append((place, reason))

    def reasons(self) -> list[str]:
        """One line for each reason and file, with the places."""
        places: dict[tuple[str, str], list[str]] = {}
        for place, reason in self.kept:
            file, _, part = place.rpartition(", ")
            places.setdefault((file, reason), []).append(part)
        return [
            f"{file}{', ' if file else ''}{listing(parts, MOST_PLACES)}: {reason}"
            for (file, reason), parts in places.items()
        ]

    def by_reason(self) -> list[str]:
        """The same with the places of all records that were kept."""
        places: dict[tuple[str, str], list[str]] = {}
        for place, reason in self.kept:
            file, _, part = place.rpartition(", ")
            places.setdefault((file, reason), []).append(part)
        return [f"{file}{', ' if file else ''}{in_ranges(parts)}: {reason}" for (file, reason), parts in places.items()]

    def check(self, records: int) -> None:
        """Raises CheckpointError, with all reasons, if there are more bad records than are allowed."""
        if self.count <= self.allowed:
            return
        reasons = self.reasons()
        if self.count == 1:
            raise CheckpointError(reasons[0])
        raise CheckpointError(
            f"{self.count:,} of {records:,} records are bad: {listing(reasons, MOST_REASONS, '; ')}; "
            f"correct them, or leave them out with --skip-bad {self.count}"
        )


def in_ranges(positions: Sequence[str]) -> str:
    """Returns `lines 3, 7-9` for `["line 3", "line 7", "line 8", "line 9"]`."""
    words = [position.rpartition(" ") for position in positions]
    if len(words) == 1 or len({word for word, _, _ in words}) > 1 or not all(number.isdigit() for *_, number in words):
        return ", ".join(positions)
    numbers = sorted({int(number) for *_, number in words})
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    shown = (f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{words[0][0]}s {', '.join(shown)}"


@dataclass
class Found:
    """What a set of records has.

    records: their number. shapes: records of each shape. unused: records with each key that their shape does not read.
    split: conversations that became several examples.
    """

    records: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    split: int = 0


def check_fields(fields: Mapping[str, str], keys: Sequence[str] = KEYS) -> None:
    """Raises ConfigError unless `fields` maps keys of the shapes, which are `keys`, to keys of records."""
    unknown = [key for key in fields if key not in keys]
    require(not unknown, f"fields must name keys of the shapes ({listing(keys, len(keys))})", listing(unknown))


def renamed(record: Mapping[str, object], fields: Mapping[str, str]) -> Record:
    """The record without its nulls, and with the keys of the shapes. fields: key of a shape -> key of the record.

    A key such as `turn.answer` reads `answer` of the object `turn`, unless the record has a key of that name.
    """
    if not fields:
        return {key: value for key, value in record.items() if value is not None}
    used = {name if name in record else name.partition(".")[0] for name in fields.values()}
    kept = {key: value for key, value in record.items() if value is not None and key not in used}
    mapped = {key: _value(record, name) for key, name in fields.items()}
    return kept | {key: value for key, value in mapped.items() if value is not None}


def _value(record: Mapping[str, object], name: str) -> object:
    if name in record:
        return record[name]
    value: object = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def check_record(record: object, place: str = "record", prompts_too: bool = False) -> Content | Answered:
    """Returns what a record contains. Raises CheckpointError, beginning with `place`, for one of no shape.

    prompts_too: also accept a prompt without a completion.
    """
    if not isinstance(record, Mapping):
        got = f"{type(record).__name__} {excerpt(record)}"
        raise CheckpointError(f"{place}: expected a JSON object, got {got}; write one JSON object per line")
    plain = renamed(record, {})
    return shape_of(plain, place, prompts_too).read(plain, place)


def checked_records(
    raws: Iterable[RawRecord],
    found: Found,
    fields: Mapping[str, str] | None = None,
    find_shape: FindShape = shape_of,
) -> Iterator[CheckedRecord]:
    """Yields what each record contains, or the reason why it is bad. found: is counted up.

    find_shape: returns the shape of a record, as `shape_of`.
    """
    for place, value, error in raws:
        found.records += 1
        if value is None:
            yield CheckedRecord(place, None, error)
            continue
        record = renamed(value, fields or {})
        try:
            shape = find_shape(record, place)
            content = shape.read(record, place)
        except CheckpointError as problem:
            yield CheckedRecord(place, None, reason_of(problem, place))
            continue
        found.shapes[shape.name] += 1
        found.unused.update(unused_keys(record, shape))
        yield CheckedRecord(place, content, None)


def reason_of(error: CheckpointError, place: str) -> str:
    """The message of an error without the place that it begins with."""
    return str(error).removeprefix(f"{place}: ")


def read_records(path: str | Path, prompts_too: bool = False) -> list[dict[str, object]]:
    """Returns the records of a file or folder, checked.

    prompts_too: also accept a prompt without a completion.
    Raises CheckpointError for a file that cannot be read, and one with all reasons for bad records.
    """
    kept: list[dict[str, object]] = []

    def noted(raws: Iterable[RawRecord]) -> Iterator[RawRecord]:
        for raw in raws:
            kept.append(raw.value or {})
            yield raw

    bad = BadRecords()
    find_shape = functools.partial(shape_of, prompts_too=prompts_too)
    for place, _, error in checked_records(noted(raw_records(Source(str(path)))), Found(), None, find_shape):
        if error is not None:
            bad.add(place, error)
    bad.check(len(kept))
    if not kept:
        raise CheckpointError(f"{path} holds no records; expected one JSON object per line")
    return kept


def joined(chunk: list[Drafted], tokens: Iterator[Marked]) -> Iterator[tuple[str, list[Marked] | str]]:
    """Yields the place of each record of a chunk, and its examples, or the reason why it is bad."""
    for place, made in chunk:
        if isinstance(made, str):
            yield place, made
        elif isinstance(made, Marked):
            yield place, [made]
        else:
            examples = list(itertools.islice(tokens, len(made)))
            empty = next((draft.text for draft, example in zip(made, examples, strict=True) if not example.ids), None)
            if empty is not None:
                yield place, f"the text has no tokens; got {excerpt(empty)}; write one that is not empty"
            else:
                yield place, examples
