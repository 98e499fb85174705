"""What a set of records becomes: counts, lengths, tokens that are learned, and what was shortened, dropped or bad."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qlora_lite.data.mixture import Mixture
from qlora_lite.data.packing import packed_fill
from qlora_lite.data.tokenization import SourceTokens, TokenizedSet
from qlora_lite.errors import listing

# The proposed max_length is the smallest multiple that leaves this share of the examples whole.
LENGTH_STEP = 64
WHOLE_SHARE = 0.99
BINS = 16


@dataclass(frozen=True)
class SourceSummary:
    """One source. shapes: records of each shape. unused_keys: records with each key that is not read."""

    source: str
    records: int
    examples: int
    shapes: dict[str, int]
    unused_keys: dict[str, int]
    bad: int
    bad_because: list[str]
    cached: bool


@dataclass(frozen=True)
class Lengths:
    """Tokens of the examples before they are truncated. counts: of the lengths up to each of `up_to`."""

    shortest: int
    median: int
    longest: int
    up_to: list[int]
    counts: list[int]
    proposed_max_length: int


@dataclass(frozen=True)
class Summary:
    """What becomes of the records of a TokenizedSet.

    duplicates: records whose tokens equal those of another record before them. learned_tokens, tokens: of the examples
    within `max_length`. packed_fill: the share of the tokens of packed rows that is not padding; None without
    `max_length`.
    """

    sources: list[SourceSummary]
    records: int
    examples: int
    split: int
    duplicates: int
    shortened: int
    dropped: int
    bad: int
    tokens: int
    learned_tokens: int
    lengths: Lengths
    packed_fill: float | None

    def to_json(self) -> dict[str, object]:
        """Returns the summary as plain data for `json.dumps`."""
        return asdict(self)

    def in_words(self) -> list[str]:
        """Three lines, as `train` prints them before its first step."""
        shapes: Counter[str] = Counter()
        for source in self.sources:
            shapes.update(source.shapes)
        unused = dict.fromkeys(key for source in self.sources for key in source.unused_keys)
        kinds = listing(f"{count:,} {name}" for name, count in shapes.most_common())
        share = self.learned_tokens / self.tokens
        fates = {
            "conversations split": self.split,
            "duplicates": self.duplicates,
            "shortened": self.shortened,
            "dropped": self.dropped,
            "bad records left out": self.bad,
        }
        happened = listing((f"{count:,} {name}" for name, count in fates.items() if count), len(fates))
        ignored = f"; keys not used: {listing(unused)}" if unused else ""
        return [
            f"{self.records:,} records ({kinds}), {self.examples:,} examples{ignored}",
            f"{self.tokens:,} tokens, {self.learned_tokens:,} of them learned ({share:.0%}); "
            f"examples of {self.lengths.shortest:,} to {self.lengths.longest:,} tokens, median {self.lengths.median:,}",
            happened or "nothing shortened, dropped, split or bad",
        ]


def summarize(tokenized: TokenizedSet) -> Summary:
    """Returns what became of the records of a set."""
    examples = tokenized.examples
    lengths = torch.cat([part.arrays.lengths for part in tokenized.parts])
    return Summary(
        sources=[_of_source(part) for part in tokenized.parts],
        records=sum(part.found.records for part in tokenized.parts),
        examples=len(examples),
        split=tokenized.split,
        duplicates=_duplicates(tokenized.parts),
        shortened=tokenized.truncated,
        dropped=tokenized.dropped,
        bad=tokenized.skipped,
        tokens=int(examples.lengths.sum()),
        learned_tokens=sum(part.learned_tokens for part in examples.parts),
        lengths=_lengths(lengths),
        packed_fill=_fill(examples),
    )


def _of_source(part: SourceTokens) -> SourceSummary:
    found, examples = part.found, len(part.arrays)
    reasons, bad = part.bad.reasons(), part.bad.count
    return SourceSummary(
        part.name, found.records, examples, dict(found.shapes), dict(found.unused), bad, reasons, part.was_cached
    )


def _duplicates(parts: Sequence[SourceTokens]) -> int:
    digests = []
    for part in parts:
        records = part.arrays.records
        is_first = torch.ones(len(records), dtype=torch.bool)
        is_first[1:] = records[1:] != records[:-1]
        digests.append(part.arrays.digests[is_first])
    whole = torch.cat(digests)
    return len(whole) - len(whole.unique())


def _lengths(lengths: Tensor) -> Lengths:
    ordered = lengths.sort().values
    longest = int(ordered[-1])
    whole = int(ordered[min(len(ordered) - 1, math.ceil(WHOLE_SHARE * len(ordered)) - 1)])
    up_to = _bin_ends(longest)
    below = torch.searchsorted(ordered, torch.tensor(up_to, dtype=ordered.dtype), right=True)
    counts = below.diff(prepend=torch.zeros(1, dtype=below.dtype))
    proposed = math.ceil(whole / LENGTH_STEP) * LENGTH_STEP
    return Lengths(int(ordered[0]), int(ordered[(len(ordered) - 1) // 2]), longest, up_to, counts.tolist(), proposed)


def _bin_ends(longest: int) -> list[int]:
    """At most BINS ends of equal bins, at multiples of a round number."""
    width = next(
        step * 10**power for power in range(12) for step in (1, 2, 5) if math.ceil(longest / (step * 10**power)) <= BINS
    )
    return [width * number for number in range(1, math.ceil(longest / width) + 1)]


def _fill(examples: Mixture) -> float | None:
    max_length = examples.parts[0].max_length
    return None if max_length is None else packed_fill(examples.lengths.tolist(), max_length).share
