"""Tests of examples read back from arrays."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_lite.data.encoding import Marked
from qlora_lite.data.mixture import Mixture
from qlora_lite.data.tasks.examples import TaskExample, TaskExamples, task_examples
from qlora_lite.data.token_arrays import Examples, TokenWriter


def made(*notes: dict[str, Any], first: int = 0) -> TaskExamples:
    """Examples whose tokens count from `first`."""
    writer = TokenWriter()
    for number, note in enumerate(notes):
        ids, stored = list(range(first, first + sum(note["texts"]))), json.dumps(note, ensure_ascii=False).encode()
        writer.append(number, [Marked([*ids, *stored], [(len(ids), len(ids) + len(stored))])])
    return TaskExamples(writer.finish()[0])


def test_an_example_has_its_texts_and_its_answer() -> None:
    found = made({"texts": [2, 3], "answer": "größer", "second": 1}, {"texts": [4], "shortened": 1})
    expected = TaskExample([0, 1, 2, 3, 4], [-100] * 5, lengths=(2, 3), second=1, answer="größer")
    assert found[0] == expected and not expected.shortened
    assert found[0].texts == [[0, 1], [2, 3, 4]] and found[1].answer is None and found[1].shortened
    assert found.lengths.tolist() == [3, 4] and found.truncated == 1 and found.learned_tokens == 2
    assert list(found) == [found[0], found[1]]
    with pytest.raises(IndexError):
        found[2]


def test_views_and_held_out_shares_stay_examples_of_a_task() -> None:
    found = made(*({"texts": [n + 1], "answer": n % 2} for n in range(8)))
    part: Any = found[2:5]
    assert isinstance(part, TaskExamples) and [example.lengths for example in part] == [(3,), (4,), (5,)]
    kept, held_out = Mixture([found]).held_out(0.25)
    assert (len(kept), len(held_out)) == (6, 2) and len(task_examples(kept.parts)) == 1
    assert task_examples([Examples(found.arrays)]) == []
