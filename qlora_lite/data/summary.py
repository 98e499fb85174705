"""What a set of records becomes: counts, lengths, tokens that are learned, and what was shortened, dropped or bad."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qlora_lite.data.mixture import Mixture
from qlora_lite.data.packing import packed_fill
from qlora_lite.data.token_arrays import NEVER
from qlora_lite.data.tokenization import SourceTokens, TokenizedSet
from qlora_lite.errors import listing

# The proposed max_length is the smallest multiple that leaves this share of the examples whole.
LENGTH_STEP = 64
WHOLE_SHARE = 0.99
BINS = 16
MOST_KEYS = 12


@dataclass(frozen=True)
class SourceSummary:
    """One source. shapes: records of each shape. unused_keys: records with each key that is not read.

    weight: its share of an epoch, None if none is given. examples_in_epoch: then as many of its examples are taken.
    """

    source: str
    records: int
    examples: int
    shapes: dict[str, int]
    unused_keys: dict[str, int]
    bad: int
    bad_because: list[str]
    cached: bool
    weight: float | None
    examples_in_epoch: int

    def figures(self) -> list[tuple[str, str]]:
        """Names and values, for people. Keys may hold anything that the records do."""
        shapes = sorted(self.shapes.items(), key=lambda item: -item[1])
        unused = sorted(self.unused_keys.items(), key=lambda item: -item[1])
        figures = [
            ("records", f"{self.records:,}"),
            ("shapes", listing((f"{count:,} {name}" for name, count in shapes), len(shapes)) or "none"),
            ("keys not read", listing((f"{key} (in {count:,})" for key, count in unused), MOST_KEYS) or "none"),
            ("bad records", f"{self.bad:,}"),
            ("examples", f"{self.examples:,}" + (", their tokens read from the cache" if self.cached else "")),
        ]
        if self.weight is not None:
            figures.append(("of an epoch", f"{self.examples_in_epoch:,} examples ({self.weight:.0%})"))
        return figures


@dataclass(frozen=True)
class Lengths:
    """Tokens of the examples before they are truncated.

    most: the length that 99 % of the examples do not exceed. counts: of the lengths up to each of `up_to`; the last bin
    has the few examples that are far longer than `most`. proposed_max_length: the smallest multiple of 64 that is not
    below `most`, or the model's longest sequence if that is shorter.
    """

    shortest: int
    median: int
    most: int
    longest: int
    up_to: list[int]
    counts: list[int]
    proposed_max_length: int


@dataclass(frozen=True)
class Summary:
    """What becomes of the records of a TokenizedSet.

    duplicates: records whose tokens equal those of another record before them. nothing_to_learn: those of `dropped`
    that have no learned token at any `max_length`. learned_tokens, tokens: of the examples within `max_length`.
    learned_tokens_lost: those behind `max_length`. packed_fill: the share of the tokens of packed rows that is not
    padding; None without `max_length`. longest_sequence: of the model, None if unknown.
    """

    sources: list[SourceSummary]
    records: int
    examples: int
    split: int
    duplicates: int
    shortened: int
    dropped: int
    nothing_to_learn: int
    bad: int
    tokens: int
    learned_tokens: int
    learned_tokens_lost: int
    lengths: Lengths
    packed_fill: float | None
    max_length: int | None
    longest_sequence: int | None

    def to_json(self) -> dict[str, object]:
        """Returns the summary as plain data for `json.dumps`."""
        return asdict(self)

    def in_words(self, packing: bool = False) -> list[str]:
        """Three lines, as `train` prints them before its first step. packing: also say how full packed rows are."""
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
        fill = f"; packed rows {self.packed_fill:.1%} full" if packing and self.packed_fill is not None else ""
        return [
            f"{self.records:,} records ({kinds}), {self.examples:,} examples{ignored}",
            f"{self.tokens:,} tokens, {self.learned_tokens:,} of them learned ({share:.0%}); "
            f"examples of {self.lengths.shortest:,} to {self.lengths.longest:,} tokens, median {self.lengths.median:,}",
            (happened or "nothing shortened, dropped, split or bad") + fill,
        ]

    def figures(self) -> list[tuple[str, str]]:
        """Names and values of what becomes of all records, for people."""
        within = "" if self.max_length is None else f" at {self.max_length:,} tokens"
        behind = self.dropped - self.nothing_to_learn
        reasons = [f"{self.nothing_to_learn:,} with nothing to learn"] if self.nothing_to_learn else []
        reasons += [f"{behind:,} with nothing to learn before the cut"] if behind else []
        learned, lost = self.learned_tokens, self.learned_tokens_lost
        share, share_lost = learned / self.tokens, lost / max(1, learned + lost)
        figures = [
            ("examples to train on", f"{self.examples:,}"),
            ("conversations split", f"{self.split:,}"),
            ("duplicate records", f"{self.duplicates:,}"),
            ("examples shortened", f"{self.shortened:,}{within}"),
            ("examples dropped", f"{self.dropped:,}" + (f": {listing(reasons)}" if reasons else "")),
            ("tokens", f"{self.tokens:,}: {learned:,} learned ({share:.0%}), {self.tokens - learned:,} not"),
            ("learned tokens lost", f"{lost:,} ({share_lost:.1%}){within}"),
        ]
        fill = [] if self.packed_fill is None else [("packed rows", f"{self.packed_fill:.1%} full{within}")]
        return figures + fill

    def length_notes(self) -> list[str]:
        """Sentences about the lengths, and about the `max_length` that is proposed."""
        found, longest = self.lengths, self.longest_sequence
        spread = f"{found.shortest:,} to {found.longest:,} tokens, median {found.median:,}"
        notes = [f"{spread}, {WHOLE_SHARE:.0%} have at most {found.most:,}"]
        whole = f"{WHOLE_SHARE:.0%} of the examples whole"
        why = f"the smallest multiple of {LENGTH_STEP} that leaves {whole}"
        if found.proposed_max_length == longest:
            why = "the model's longest sequence" + (f"; {found.most:,} would leave {whole}" * (found.most > longest))
        notes.append(f"proposed: --max-length {found.proposed_max_length}, {why}")
        if longest is not None:
            notes.append(f"the model's longest sequence: {longest:,} tokens")
        kept = min(found.longest, self.max_length or found.longest)
        if longest is not None and kept > longest:
            notes.append(f"--max-length leaves examples of up to {kept:,} tokens, which is more")
        return notes


def summarize(tokenized: TokenizedSet, longest_sequence: int | None = None) -> Summary:
    """Returns what became of the records of a set. longest_sequence: of the model, which no proposed length exceeds."""
    examples, arrays = tokenized.examples, [part.arrays for part in tokenized.parts]
    learned = sum(part.learned_tokens for part in examples.parts)
    return Summary(
        sources=list(_of_sources(tokenized)),
        records=sum(part.found.records for part in tokenized.parts),
        examples=len(examples),
        split=tokenized.split,
        duplicates=_duplicates(tokenized.parts),
        shortened=tokenized.truncated,
        dropped=tokenized.dropped,
        nothing_to_learn=sum(int((part.first_learned == NEVER).sum()) for part in arrays),
        bad=tokenized.skipped,
        tokens=int(examples.lengths.sum()),
        learned_tokens=learned,
        learned_tokens_lost=sum(int(part.learned.sum()) for part in arrays) - learned,
        lengths=_lengths(torch.cat([part.lengths for part in arrays]), longest_sequence),
        packed_fill=_fill(examples),
        max_length=examples.parts[0].max_length,
        longest_sequence=longest_sequence,
    )


def _of_sources(tokenized: TokenizedSet) -> Iterator[SourceSummary]:
    mixture = tokenized.examples
    weights = mixture.weights or [None] * len(mixture.parts)
    for part, weight, count in zip(tokenized.parts, weights, mixture.counts(), strict=True):
        found, bad = part.found, part.bad
        yield SourceSummary(
            part.name,
            found.records,
            len(part.arrays),
            dict(found.shapes),
            dict(found.unused),
            bad.count,
            bad.reasons(),
            part.was_cached,
            weight,
            count,
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


def _lengths(lengths: Tensor, longest_sequence: int | None = None) -> Lengths:
    ordered = lengths.sort().values
    shortest, longest = int(ordered[0]), int(ordered[-1])
    most = int(ordered[math.ceil(WHOLE_SHARE * len(ordered)) - 1])
    up_to = _bin_ends(most)
    if up_to[-1] < longest:
        up_to.append(longest)
    below = torch.searchsorted(ordered, torch.tensor(up_to, dtype=ordered.dtype), right=True)
    counts = below.diff(prepend=torch.zeros(1, dtype=below.dtype))
    proposed = math.ceil(most / LENGTH_STEP) * LENGTH_STEP
    proposed = proposed if longest_sequence is None else min(proposed, longest_sequence)
    median = int(ordered[(len(ordered) - 1) // 2])
    return Lengths(shortest, median, most, longest, up_to, counts.tolist(), proposed)


def _bin_ends(longest: int) -> list[int]:
    """At most BINS ends of equal bins up to a length, at multiples of a round number."""
    width = next(
        step * 10**power for power in range(12) for step in (1, 2, 5) if math.ceil(longest / (step * 10**power)) <= BINS
    )
    return [width * number for number in range(1, math.ceil(longest / width) + 1)]


def _fill(examples: Mixture) -> float | None:
    max_length = examples.parts[0].max_length
    return None if max_length is None else packed_fill(examples.lengths, max_length).share
