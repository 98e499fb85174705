"""The prompts of files: records of every kind that training reads, and plain text, a prompt a line."""

from __future__ import annotations

import functools
import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_lite.checkpoints.files import open_regular
from qlora_lite.checks import is_count, require
from qlora_lite.data.records import BadRecords, CheckedRecord, Found, check_fields, checked_records
from qlora_lite.data.shapes import shape_of
from qlora_lite.data.sources.json_lines import lines_of
from qlora_lite.data.sources.raw import TOO_LONG, RawRecord
from qlora_lite.data.sources.source import parse_source, raw_records
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.generation.prompts import Prompt, Prompts
from qlora_lite.signals import check_signals

TEXT_SUFFIX = ".txt"
TOKEN_TYPE = "i"  # of an array: 4 bytes


@dataclass(frozen=True)
class PromptSet:
    """The prompts of files, in order. skipped: bad records that were left out."""

    prompts: list[Prompt]
    skipped: int = 0

    def fingerprint(self) -> str:
        """The SHA-256 of all tokens and of where each prompt ends."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(len(prompt.tokens).to_bytes(8, "little") + array(TOKEN_TYPE, prompt.tokens).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Room:
    """The positions that a model was made for, None if unknown, and those that an answer may take."""

    positions: int | None
    answer: int

    def problem(self, tokens: int) -> str | None:
        """Why a prompt of this length and its answer have no room; None if they do."""
        if self.positions is None or tokens + self.answer <= self.positions:
            return None
        return (
            f"has {tokens:,} tokens and an answer of up to {self.answer:,}, and the model was made for "
            f"{self.positions:,} positions; shorten it, or lower max_new_tokens"
        )


def read_prompts(
    sources: Sequence[str],
    prompts: Prompts,
    room: Room,
    fields: Mapping[str, str] | None = None,
    limit: int | None = None,
    skip_bad: int = 0,
) -> PromptSet:
    """Returns the prompts of files, folders and data sets, in their order.

    A record with an answer is asked without it. A `.txt` file has a prompt in each line that is not blank.
    fields: key of a shape -> key of the records. limit: records of each source that are read. skip_bad: bad records of
    each source that are left out.
    Raises CheckpointError for more bad records, with their reasons, and for sources without records.
    """
    require(bool(sources), "sources must name at least one file, folder or data set", sources)
    require(limit is None or is_count(limit, 1), "limit must be None or at least 1", limit)
    require(is_count(skip_bad, 0), "skip_bad must be at least 0", skip_bad)
    check_fields(fields or {})
    made: list[Prompt] = []
    skipped = 0
    for source in sources:
        found, bad = Found(), BadRecords(skip_bad)
        find_shape = functools.partial(shape_of, prompts_too=True)
        records = checked_records(itertools.islice(_raw(source), limit), found, fields, find_shape)
        for record in records:
            check_signals()
            prompt = _prompt(record, prompts, room)
            if isinstance(prompt, str):
                bad.add(record.place, prompt)
            else:
                made.append(prompt)
        bad.check(found.records)
        if found.records == bad.count:
            raise CheckpointError(f"{source} holds no prompts; expected records, or a line of text for each")
        skipped += bad.count
    return PromptSet(made, skipped)


def _prompt(record: CheckedRecord, prompts: Prompts, room: Room) -> Prompt | str:
    """The prompt of a record, or the reason why it has none."""
    if record.content is None:
        return str(record.error)
    try:
        found = prompts.of_record(record.content)
    except CheckpointError as error:
        return str(error)
    return room.problem(len(found.tokens)) or replace(found, tokens=array(TOKEN_TYPE, found.tokens))


def _raw(text: str) -> Iterator[RawRecord]:
    source = parse_source(text)
    if source.weight is not None:
        raise ConfigError(f"{text}: prompts are answered once each, so a source has no share; leave out the = and it")
    path = Path(source.location)
    return _lines(path) if path.suffix.lower() == TEXT_SUFFIX and path.is_file() else raw_records(source)


def _lines(path: Path) -> Iterator[RawRecord]:
    """A prompt of each line of a text file that is not blank."""
    with open_regular(path, "text, with a prompt in each line") as file:
        yield from _records_of(lines_of(file), str(path))


def _records_of(lines: Iterable[bytes | None], name: str) -> Iterator[RawRecord]:
    for number, line in enumerate(lines, 1):
        place = f"{name}, line {number}"
        if line is None:
            yield RawRecord(place, None, TOO_LONG)
        elif line.strip():
            try:
                yield RawRecord(place, {"prompt": line.decode("utf-8")}, None)
            except UnicodeDecodeError as error:
                bad = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
                yield RawRecord(place, None, f"not UTF-8 ({bad}); save the file as UTF-8")
