"""Examples of tasks, read from the arrays of `token_arrays`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.data.token_arrays import Examples, TokenArrays


@dataclass(frozen=True)
class TaskExample(TokenizedExample):
    """The tokens of the texts of a record, one after the other, and its answer.

    lengths: the number of tokens of each text. second: the first token of the second of two texts, None if the model is
    not told. answer: the label, the labels or the number; of words, the labels and the word that each token begins.
    """

    lengths: tuple[int, ...] = ()
    second: int | None = None
    answer: Any = None
    shortened: bool = False

    @property
    def texts(self) -> list[list[int]]:
        """The tokens of each text."""
        found, first = [], 0
        for length in self.lengths:
            found.append(self.input_ids[first : first + length])
            first += length
        return found


@dataclass(frozen=True)
class TaskNote:
    """What an example has beside its tokens."""

    texts: list[int]
    answer: Any = None
    second: int | None = None
    shortened: int = field(default=0)


class TaskExamples(Examples):
    """Chosen examples of a task. Indexing makes an example; a slice is a view. Texts were cut when they were made."""

    def __init__(self, arrays: TokenArrays, chosen: Tensor | None = None, max_length: int | None = None) -> None:
        super().__init__(arrays, chosen, None)

    @cached_property
    def lengths(self) -> Tensor:
        """The tokens of the longest text of each example (int32)."""
        return torch.tensor([max(note.texts) for note in self.notes()], dtype=torch.int32)

    def _note(self, index: int) -> TaskNote:
        signed = self.arrays.signed_tokens(int(self.chosen[index]))
        first = int(self.arrays.first_learned[self.chosen[index]])
        return TaskNote(**json.loads(bytes(signed[first:].tolist())))

    def notes(self) -> Iterator[TaskNote]:
        """Yields what the examples have beside their tokens."""
        return (self._note(index) for index in range(len(self)))

    def made(self, index: int) -> TaskExample:
        """Returns an example."""
        note = self._note(index)
        count = sum(note.texts)
        ids = (~self.arrays.signed_tokens(int(self.chosen[index]), count)).tolist()
        return TaskExample(
            ids,
            [IGNORE_INDEX] * count,
            lengths=tuple(note.texts),
            second=note.second,
            answer=note.answer,
            shortened=bool(note.shortened),
        )

    @property
    def truncated(self) -> int:
        """How many examples have a text that is cut at `max_length`."""
        return sum(note.shortened for note in self.notes())

    @property
    def learned_tokens(self) -> int:
        """The number of examples, because each has one answer."""
        return len(self)


def task_examples(parts: Sequence[Examples]) -> list[TaskExamples]:
    """Returns the parts of a mixture that are examples of a task."""
    return [part for part in parts if isinstance(part, TaskExamples)]
