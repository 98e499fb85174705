"""What a set of records becomes for a task, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from qlora_lite.data.tasks.examples import task_examples
from qlora_lite.data.tasks.labels import Labels
from qlora_lite.data.tokenization import TokenizedSet
from qlora_lite.errors import listing


@dataclass(frozen=True)
class TaskSummary:
    """What becomes of the records of a set. tokens: of all texts. shortest, median, longest: tokens of a text."""

    records: int
    examples: int
    shapes: dict[str, int]
    unused_keys: dict[str, int]
    tokens: int
    shortest: int
    median: int
    longest: int
    shortened: int
    bad: int
    kind: str
    labels: dict[str, int]

    def to_json(self) -> dict[str, object]:
        """Returns the summary as plain data for `json.dumps`."""
        return asdict(self)

    def in_words(self, labels: Labels) -> list[str]:
        """Three lines, as `train` prints them before its first step."""
        kinds = listing(f"{count:,} {name}" for name, count in sorted(self.shapes.items(), key=lambda item: -item[1]))
        ignored = f"; keys not used: {listing(self.unused_keys)}" if self.unused_keys else ""
        fates = {"shortened": self.shortened, "bad records left out": self.bad}
        happened = listing(f"{count:,} {name}" for name, count in fates.items() if count)
        return [
            f"{self.records:,} records ({kinds}), {self.examples:,} examples{ignored}",
            f"{self.tokens:,} tokens; texts of {self.shortest:,} to {self.longest:,} tokens, median {self.median:,}; "
            f"{happened or 'nothing shortened or bad'}",
            labels.in_words(),
        ]


def summarize_task(tokenized: TokenizedSet, labels: Labels) -> TaskSummary:
    """Returns what became of the records of a set. labels: what its examples have to say."""
    shapes: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    for part in tokenized.parts:
        shapes.update(part.found.shapes)
        unused.update(part.found.unused)
    lengths = sorted(
        length for part in task_examples(tokenized.examples.parts) for note in part.notes() for length in note.texts
    )
    return TaskSummary(
        records=sum(part.found.records for part in tokenized.parts),
        examples=len(tokenized.examples),
        shapes=dict(shapes),
        unused_keys=dict(unused),
        tokens=sum(lengths),
        shortest=lengths[0],
        median=lengths[(len(lengths) - 1) // 2],
        longest=lengths[-1],
        shortened=tokenized.truncated,
        bad=tokenized.skipped,
        kind=labels.kind,
        labels=labels.counts,
    )
