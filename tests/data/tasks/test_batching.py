"""Tests of the batches of tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_lite.data.mixture import Mixture
from qlora_lite.data.tasks.batching import collated, task_batches
from qlora_lite.data.tasks.labels import Labels
from qlora_lite.errors import CheckpointError, ConfigError
from tests.data.tasks.test_examples import made

CLASSES = Labels("classes", ("a", "b"))


def batch(labels: Labels, *notes: dict[str, Any]) -> dict[str, list[Any]]:
    examples: Any = list(made(*notes, first=5))
    return {name: value.tolist() for name, value in collated(examples, labels, 9).items()}


def test_rows_are_padded_and_classes_are_numbers() -> None:
    found = batch(CLASSES, {"texts": [3], "answer": "b"}, {"texts": [2], "answer": "a"})
    assert found == {
        "input_ids": [[5, 6, 7], [5, 6, 9]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [1, 0],
    }
    found = batch(CLASSES, {"texts": [3], "answer": "b", "second": 2}, {"texts": [4], "answer": "a", "second": 1})
    assert found["token_type_ids"] == [[0, 0, 1, 0], [0, 1, 1, 1]]


def test_the_labels_of_each_kind() -> None:
    numbers = batch(Labels("numbers"), {"texts": [1], "answer": "0.5"}, {"texts": [1], "answer": 2})
    assert numbers["labels"] == [0.5, 2.0]
    several = batch(
        Labels("several classes", ("a", "b")), {"texts": [1], "answer": ["b"]}, {"texts": [1], "answer": []}
    )
    assert several["labels"] == [[0.0, 1.0], [0.0, 0.0]]
    own = Labels("words", ("O", "X"))
    notes = {"texts": [3], "answer": [["X", "O"], [0, -1, 1]]}, {"texts": [1], "answer": [["X"], [0]]}
    words = batch(own, *notes)
    assert words["labels"] == [[1, -100, 0], [1, -100, -100]]
    pairs = batch(Labels("preferences"), {"texts": [1, 2]}, {"texts": [2, 1]})
    assert pairs["input_ids"] == [[5, 9], [5, 6]] and pairs["rejected_input_ids"] == [[6, 7], [7, 9]]
    assert pairs["rejected_attention_mask"] == [[1, 1], [1, 0]]
    targets = batch(Labels("targets"), {"texts": [1, 2]}, {"texts": [2, 1]})
    assert targets["input_ids"] == [[5, 9], [5, 6]] and targets["labels"] == [[6, 7], [7, -100]]
    similar = batch(Labels("similar texts"), {"texts": [1, 2, 1]}, {"texts": [2, 1, 1]})
    assert similar["positive_input_ids"] == [[6, 7], [7, 9]] and similar["negative_attention_mask"] == [[1], [1]]
    with pytest.raises(CheckpointError, match="label 'c' is not one of those that are trained on: a, b"):
        batch(CLASSES, {"texts": [1], "answer": "c"})


def test_every_example_comes_once_in_an_epoch_in_an_order_that_the_seed_decides() -> None:
    examples = Mixture([made(*({"texts": [n + 1], "answer": "ab"[n % 2]} for n in range(7)))])

    def lengths(seed: int, epochs: int) -> list[int]:
        stream = task_batches(examples, CLASSES, 3, seed, pad_token_id=0, epochs=epochs)
        return [length for own in stream for length in own["attention_mask"].sum(1).tolist()]

    assert sorted(lengths(0, 1)) == list(range(1, 8)) and lengths(0, 2) == lengths(0, 2) != lengths(1, 2)
    assert lengths(0, 2)[:7] == lengths(0, 1) != lengths(0, 2)[7:]
    with pytest.raises(ConfigError, match="batch_size must be an integer of at least 1"):
        task_batches(examples, CLASSES, 0, 0, pad_token_id=0)
    assert next(task_batches(examples, CLASSES, 3, 0, pad_token_id=0))["labels"].dtype == torch.int64
