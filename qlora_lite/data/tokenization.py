"""Tokenizes records, with labels on the tokens that are learned.

    records -> drafts (here) -> tokens (in a thread) -> arrays, in memory or cached on disk -> TokenizedSet

Chat templates are rendered by Python and texts are tokenized by Rust without Python's lock, so both run at once. The
tokenizer is any object with the methods of `Tokenizer`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import ClassVar

from qlora_lite.checks import is_count, require
from qlora_lite.data.encoding import Encoder, Marked, TokenizedExample, Tokenizer
from qlora_lite.data.images.processor import ImageProcessor
from qlora_lite.data.mixture import Mixture, mixture_weights
from qlora_lite.data.records import (
    BadRecords,
    CheckedRecord,
    Drafted,
    Found,
    RecordEncoder,
    check_fields,
    checked_records,
    joined,
    reason_of,
)
from qlora_lite.data.shapes import KEYS, Record, Shape, shape_of
from qlora_lite.data.sources.raw import RawRecord
from qlora_lite.data.sources.source import Source, parse_source, raw_records
from qlora_lite.data.token_arrays import Examples, ImagesInMemory, TokenArrays, TokenWriter, with_something_to_learn
from qlora_lite.data.token_cache import cache_folder, cache_key, load_tokens, save_tokens
from qlora_lite.errors import CheckpointError
from qlora_lite.signals import check_signals

# Records that are tokenized at once: so many, or fewer if they are long, since the encodings of all are in memory.
# After each call the thread waits some milliseconds for Python's lock, so that 128 records take a seventh more time.
CHUNK_RECORDS = 512
CHUNK_CHARACTERS = 1 << 19
SHOWN_EVERY = 128  # records
CHUNKS_AHEAD = 3

Show = Callable[[int], None]


@dataclass(frozen=True)
class DataConfig:
    """How records become examples.

    max_length: examples are truncated to this number of tokens; None truncates none.
    learn: `answers` (each turn of the assistant, or the completion, with the token that ends it), `last-answer`, or
        `all` tokens. All tokens of a `text` are learned in either case.
    learn_empty_reasoning: also learn an empty block of reasoning that only the chat template wrote.
    fields: key of a shape -> key of the records. limit: records of each source that are read, None for all.
    skip_bad: so many bad records are left out; more are an error.
    prompts_too: keep records without a learned token, such as a prompt alone.
    date: the day that chat templates write; None is today.
    """

    max_length: int | None = None
    learn: str = "answers"
    learn_empty_reasoning: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    skip_bad: int = 0
    prompts_too: bool = False
    date: date | None = None
    keys: ClassVar[Sequence[str]] = KEYS  # those that `fields` may name

    def __post_init__(self) -> None:
        length, limit = self.max_length, self.limit
        require(length is None or is_count(length, 2), "max_length must be None or at least 2", length)
        require(limit is None or is_count(limit, 1), "limit must be None or at least 1", limit)
        require(is_count(self.skip_bad, 0), "skip_bad must be an integer of at least 0", self.skip_bad)
        check_fields(self.fields, self.keys)

    def encoder(self, tokenizer: Tokenizer, images: ImageProcessor | None = None) -> RecordEncoder:
        """An encoder of these settings. Raises ConfigError for an unknown `learn`."""
        return Encoder(tokenizer, self.learn, self.learn_empty_reasoning, self.date, images)

    def shape_of(self, record: Record, place: str) -> Shape:
        """The shape of a record. Raises CheckpointError, beginning with `place`, if it has none."""
        return shape_of(record, place, self.prompts_too)

    def cache_settings(self) -> dict[str, object]:
        """The settings that decide on the tokens of a record; the others choose among the tokens."""
        return {name: value for name, value in asdict(self).items() if name not in ("max_length", "skip_bad")}

    def kept(self, arrays: TokenArrays) -> Examples:
        """The examples of a source that are trained on."""
        chosen = None if self.prompts_too else with_something_to_learn(arrays, self.max_length)
        return Examples(arrays, chosen, self.max_length)


@dataclass(frozen=True)
class SourceTokens:
    """The tokens of one source, and what was found in it. was_cached: they were read, not made."""

    name: str
    arrays: TokenArrays
    found: Found
    bad: BadRecords
    was_cached: bool = False


@dataclass(frozen=True)
class TokenizedSet:
    """Examples of one or several sources, and what became of their records.

    truncated: the number of examples that were truncated to `max_length`.
    dropped: the number of examples left out because no learned token was within `max_length`.
    """

    examples: Mixture
    truncated: int
    dropped: int
    parts: tuple[SourceTokens, ...]

    @property
    def split(self) -> int:
        """The number of conversations that became several examples, since the chat template rewrites earlier turns."""
        return sum(part.found.split for part in self.parts)

    @property
    def skipped(self) -> int:
        """The number of bad records that were left out."""
        return sum(part.bad.count for part in self.parts)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest example."""
        return int(self.examples.lengths.max())


class NothingToLearn(CheckpointError):
    """No example is left of a source. parts: what was found in all sources."""

    def __init__(self, sentence: str, parts: Sequence[SourceTokens]) -> None:
        super().__init__(sentence)
        self.parts = tuple(parts)


class _NothingToKeep(Exception):
    """A source has no good record, so no tokens are kept of it."""


def tokenize(
    record: Mapping[str, object], tokenizer: Tokenizer, max_length: int | None = None, learn: str = "answers"
) -> TokenizedExample:
    """Returns the tokens of one record, truncated to `max_length`, with labels on the tokens that are learned.

    With a chat template, prompt and completion become a user and an assistant message. Without one they are
    concatenated and closed with EOS; instruction, input and output are separated by a blank line.
    Raises CheckpointError for a wrong record, and for one without a learned token within `max_length`.
    """
    found = tokenize_all([record], tokenizer, max_length, learn=learn)
    if len(found.examples) > 1:
        raise CheckpointError(
            f"the chat template rewrites earlier turns, so the record becomes {len(found.examples)} examples; "
            f"use tokenize_all"
        )
    return found.examples[0]


def tokenize_all(
    records: Iterable[Mapping[str, object]],
    tokenizer: Tokenizer,
    max_length: int | None = None,
    *,
    learn: str = "answers",
    learn_empty_reasoning: bool = False,
    skip_bad: int = 0,
    prompts_too: bool = False,
    date: date | None = None,
    images: ImageProcessor | None = None,
) -> TokenizedSet:
    """Returns the examples of many records, in memory. A record without a learned token within `max_length` is left
    out and counted. The settings are those of `DataConfig`. images: as in `tokenize_sources`.

    Raises CheckpointError, with the records' numbers from 1, for bad records, and if no example is left.
    """
    config = DataConfig(
        max_length,
        learn,
        learn_empty_reasoning,
        skip_bad=skip_bad,
        prompts_too=prompts_too,
        date=date,
    )
    raws = (
        RawRecord(f"record {number}", record, None)  # type: ignore[arg-type]
        for number, record in enumerate(records, 1)
    )
    writer = TokenWriter()
    found, bad = _append_all(raws, config.encoder(tokenizer, images), config, writer)
    return _tokenized_set([SourceTokens("records", writer.finish()[0], found, bad)], None, config)


def tokenize_sources(
    sources: Sequence[Source | str | Path],
    tokenizer: Tokenizer,
    config: DataConfig | None = None,
    cache: bool = True,
    show: Show | None = None,
    images: ImageProcessor | None = None,
) -> TokenizedSet:
    """Returns the examples of files, folders and hub data sets, mapped from a cache on disk.

    sources: paths, `name:split` of the hub, or these with a weight, `a.jsonl=0.7`. Weights are shares of an epoch.
    cache: keep the tokens on disk, see `token_cache`; False holds them in memory. show: is called with the number of
    records so far. images: reads the images of records for the model; None refuses them. A source with images is not
    cached.
    Raises CheckpointError for what cannot be read, for bad records, and if no example is left; ConfigError for wrong
    weights.
    """
    config = config or DataConfig()
    named = [source if isinstance(source, Source) else parse_source(str(source)) for source in sources]
    weights = mixture_weights([source.weight for source in named])
    encoder = config.encoder(tokenizer, images)
    parts = [_source_tokens(source, tokenizer, encoder, config, cache, show) for source in named]
    return _tokenized_set(parts, weights, config)


def _source_tokens(
    source: Source, tokenizer: Tokenizer, encoder: RecordEncoder, config: DataConfig, cache: bool, show: Show | None
) -> SourceTokens:
    settings = config.cache_settings() | {"date": encoder.date_written}
    key = cache_key(source, tokenizer, settings) if cache else None
    if key is not None and (loaded := load_tokens(cache_folder(source) / key)) is not None:
        arrays, noted = loaded
        bad = BadRecords(config.skip_bad, noted["bad"], [tuple(pair) for pair in noted["bad_kept"]])
        found = Found(noted["records"], Counter(noted["shapes"]), Counter(noted["unused"]), noted["split"])
        bad.check(found.records)
        return SourceTokens(source.location, arrays, found, bad, was_cached=True)
    made: list[tuple[Found, BadRecords]] = []

    def fill(writer: TokenWriter) -> dict[str, object]:
        found, bad = _append_all(raw_records(source), encoder, config, writer, show)
        made.append((found, bad))
        if bad.count == found.records:
            raise _NothingToKeep
        return {**vars(found), "bad": bad.count, "bad_kept": bad.kept}

    try:
        cached: TokenArrays | None = None
        if key is not None:
            with suppress(ImagesInMemory):
                cached, _ = save_tokens(cache_folder(source) / key, fill)
        if cached is None:
            writer = TokenWriter()
            fill(writer)
            cached = writer.finish()[0]
        arrays = cached
    except _NothingToKeep:
        arrays = TokenWriter().finish()[0]
    return SourceTokens(source.location, arrays, *made[0])


def _append_all(
    raws: Iterable[RawRecord], encoder: RecordEncoder, config: DataConfig, writer: TokenWriter, show: Show | None = None
) -> tuple[Found, BadRecords]:
    """Appends the examples of records. Raises CheckpointError if more records are bad than are allowed."""
    found, bad = Found(), BadRecords(config.skip_bad)
    limited = itertools.islice(raws, config.limit)
    for number, (place, examples) in enumerate(
        _encoded(checked_records(limited, found, config.fields, config.shape_of), encoder)
    ):
        if not isinstance(examples, str):
            examples = encoder.cut_images(examples, config.max_length) or examples
        if isinstance(examples, str):
            bad.add(place, examples)
            continue
        found.split += len(examples) > 1
        writer.append(number, examples)
        if show is not None and number % SHOWN_EVERY == 0:
            show(number)
    bad.check(found.records)
    return found, bad


def _encoded(records: Iterator[CheckedRecord], encoder: RecordEncoder) -> Iterator[tuple[str, list[Marked] | str]]:
    """Yields the place of each record, and its examples, or the reason why it is bad, in the order of the records.

    Texts are made here and tokenized in one thread, some chunks ahead, so that the order of all work is fixed.
    """
    with ThreadPoolExecutor(1) as executor:
        ahead: list[tuple[list[Drafted], Future[list[Marked]]]] = []
        while True:
            check_signals()
            chunk = _next_chunk(records, encoder)
            if chunk:
                drafts = [draft for _, made in chunk if isinstance(made, list) for draft in made]
                ahead.append((chunk, executor.submit(encoder.tokens, drafts)))
            while ahead and (len(ahead) >= CHUNKS_AHEAD or not chunk):
                made, future = ahead.pop(0)
                yield from joined(made, iter(future.result()))
            if not chunk:
                return


def _next_chunk(records: Iterator[CheckedRecord], encoder: RecordEncoder) -> list[Drafted]:
    chunk: list[Drafted] = []
    characters = 0
    for record in itertools.islice(records, CHUNK_RECORDS):
        place, made = _drafted(record, encoder)
        chunk.append((place, made))
        if isinstance(made, list):
            characters += sum(len(draft.text) for draft in made)
        if characters >= CHUNK_CHARACTERS:
            break
    return chunk


def _drafted(record: CheckedRecord, encoder: RecordEncoder) -> Drafted:
    if record.content is None:
        return record.place, str(record.error)
    try:
        return record.place, encoder.drafts(record.content)
    except CheckpointError as error:
        return record.place, reason_of(error, record.place)


def _tokenized_set(parts: Sequence[SourceTokens], weights: Sequence[float] | None, config: DataConfig) -> TokenizedSet:
    kept = [config.kept(part.arrays) for part in parts]
    for part, examples in zip(parts, kept, strict=True):
        if len(examples) == 0:
            dropped, bad = len(part.arrays), part.bad.count
            got = f"{bad:,} bad records and no other" if bad else "no records"
            got = f"{dropped} records without a token to learn" if dropped else got
            cut = f" within max_length {config.max_length}" if dropped and config.max_length else ""
            where = f"there is nothing to train on in {part.name}"
            raise NothingToLearn(f"{where}: got {got}{cut}; give records with answers that fit", parts)
    return TokenizedSet(
        Mixture(kept, weights),
        sum(examples.truncated for examples in kept),
        sum(len(part.arrays) - len(examples) for part, examples in zip(parts, kept, strict=True)),
        tuple(parts),
    )
