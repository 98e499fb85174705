"""What is learned of the records of a task: classes and their names, several at once, numbers, or preferences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_lite.checkpoints.files import excerpt
from qlora_lite.data.mixture import Mixture
from qlora_lite.data.tasks.examples import TaskNote, task_examples
from qlora_lite.errors import CheckpointError, ConfigError, listing

CLASSES, SEVERAL, NUMBERS, PREFERENCES, WORDS = "classes", "several classes", "numbers", "preferences", "words"
TARGETS, MASKED, SIMILAR = "targets", "hidden tokens", "similar texts"
# Tasks whose records are all of one kind.
OF_TASK = {"token-classification": WORDS, "seq2seq-lm": TARGETS, "masked-lm": MASKED, "embedding": SIMILAR}
# What a line for people says of kinds without labels.
WITHOUT_NAMES = {
    PREFERENCES: "one reward: the chosen text is to get a higher one than the rejected",
    NUMBERS: "one number to predict (regression)",
    TARGETS: "an encoder reads the first text, and the decoder learns to write the second",
    MASKED: "15 % of the tokens are hidden in each epoch, and learned",
    SIMILAR: "each anchor is brought near its text and away from all others of the batch (InfoNCE, temperature 0.05)",
}
# transformers' names for what a classifier of sequences learns, which choose the loss that its models compute.
PROBLEM_TYPES = {
    CLASSES: "single_label_classification",
    SEVERAL: "multi_label_classification",
    NUMBERS: "regression",
    PREFERENCES: "regression",
}
SHOWN = 12


def _order(name: str) -> tuple[bool, int, str]:
    """Whole numbers first, by size, then names by their letters."""
    is_number = name.lstrip("-").isdecimal() and name.isascii()
    return not is_number, int(name) if is_number else 0, name


@dataclass(frozen=True)
class Labels:
    """What the records of a task have to say. kind: one of the above. counts: the records (words) of each class.

    names: of the classes, sorted; a number or a reward has one output, which has no name.
    """

    kind: str
    names: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def for_model(self) -> int | list[str] | None:
        """What `load_quantized` takes as labels; None for models without a head of labels."""
        return list(self.names) or (None if self.kind in (TARGETS, MASKED, SIMILAR) else 1)

    @property
    def problem_type(self) -> str | None:
        """What transformers' config calls this problem; None for a task without a choice."""
        return PROBLEM_TYPES.get(self.kind)

    def in_words(self) -> str:
        """A line for people."""
        if self.kind in WITHOUT_NAMES:
            return WITHOUT_NAMES[self.kind]
        what = {CLASSES: "labels", SEVERAL: "labels, several of a record", WORDS: "labels of words"}[self.kind]
        named = (f"{name} ({self.counts.get(name, 0):,})" for name in self.names)
        return f"{len(self.names)} {what}: {listing(named, SHOWN)}"

    def number(self, name: object) -> int:
        """The number of a class. Raises CheckpointError for one that is not known."""
        if str(name) not in self.names:
            known = listing(self.names, SHOWN)
            raise CheckpointError(f"label {str(name)!r} is not one of those that are trained on: {known}")
        return self.names.index(str(name))


def _kind(task: str, note: TaskNote, regression: bool) -> str:
    if task in OF_TASK:
        return OF_TASK[task]
    if note.answer is None:
        return PREFERENCES
    if isinstance(note.answer, list):
        return SEVERAL
    return NUMBERS if regression or isinstance(note.answer, float) else CLASSES


def names_in(kind: str, note: TaskNote) -> list[str]:
    """Returns the names of the classes that an example has."""
    if kind in WITHOUT_NAMES:
        return []
    answer = note.answer
    return [str(name) for name in (answer[0] if kind == WORDS else answer if kind == SEVERAL else [answer])]


def as_number(answer: object) -> float:
    """Returns the number of an example. Raises CheckpointError for an answer that is none."""
    try:
        return float(answer)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"label {excerpt(answer)} is not a number, which regression needs") from error


def find_labels(examples: Mixture, task: str, regression: bool = False) -> Labels:
    """Returns what the examples of a task have to say.

    regression: labels are numbers to predict; else they are if one is not whole. Raises CheckpointError if the records
    are of several kinds, and for classes of which there is one alone; ConfigError for a wrong use of `regression`.
    """
    kinds: set[str] = set()
    texts: set[int] = set()
    counts: Counter[str] = Counter()
    answers: list[Any] = []
    for part in task_examples(examples.parts):
        for note in part.notes():
            kind = _kind(task, note, regression)
            kinds.add(kind)
            texts.add(len(note.texts))
            counts.update(names_in(kind, note))
            if kind in (NUMBERS, CLASSES):
                answers.append(note.answer)
    if kinds == {NUMBERS, CLASSES}:
        kinds = {NUMBERS}
    if len(kinds) != 1:
        raise CheckpointError(f"the records have {' and '.join(sorted(kinds))} to learn; give records of one kind")
    (kind,) = kinds
    if kind == SIMILAR and len(texts) > 1:
        raise CheckpointError("some records have a negative, and others have none; give one to all or to none")
    if regression and kind != NUMBERS:
        raise ConfigError(f"--regression is for records with one label; got {kind}")
    if kind == NUMBERS:
        for answer in answers:
            as_number(answer)
        return Labels(NUMBERS)
    if kind in WITHOUT_NAMES:
        return Labels(kind)
    names = tuple(sorted(counts, key=_order))
    if (len(names) < 2 and kind != SEVERAL) or not names:
        got = f"all {counts.total():,} have {names[0]!r}" if names else "none"
        raise CheckpointError(f"a classifier needs at least two different labels; {got}")
    return Labels(kind, names, {name: counts[name] for name in names})


def check_known(labels: Labels, examples: Mixture, task: str) -> None:
    """Raises CheckpointError for held-out examples of another kind, or with labels that are not trained on."""
    for part in task_examples(examples.parts):
        for note in part.notes():
            kind = _kind(task, note, labels.kind == NUMBERS)
            if kind != labels.kind:
                raise CheckpointError(f"held-out records have {kind} to learn, and those to train on {labels.kind}")
            if kind == NUMBERS:
                as_number(note.answer)
            unknown = sorted(set(names_in(kind, note)) - set(labels.names))
            if unknown:
                raise CheckpointError(
                    f"held-out records have the label {unknown[0]!r}, which no record to train on has "
                    f"({listing(labels.names, SHOWN)}); give training records of it, or leave it out"
                )


def labels_for(found: Labels, of_model: Sequence[str] | None) -> Labels:
    """Returns the labels to train: those of a model's head, in its order, if it has all that the records have."""
    if not found.names or of_model is None or not set(found.names) <= set(of_model):
        return found
    return Labels(found.kind, tuple(of_model), found.counts)
