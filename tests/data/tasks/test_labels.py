"""Tests of what is learned of records."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_lite.data.mixture import Mixture
from qlora_lite.data.tasks.labels import Labels, check_known, find_labels, labels_for
from qlora_lite.errors import CheckpointError, ConfigError
from tests.data.tasks.test_examples import made

SEQUENCES = "sequence-classification"


def answers(*values: Any) -> Mixture:
    return Mixture([made(*({"texts": [2], **({} if value is None else {"answer": value})} for value in values))])


def found(*values: Any, regression: bool = False) -> Labels:
    return find_labels(answers(*values), SEQUENCES, regression)


def test_names_are_sorted_numbers_by_their_size() -> None:
    labels = found("b", "a", "b")
    assert labels == Labels("classes", ("a", "b"), {"a": 1, "b": 2}) and labels.for_model == ["a", "b"]
    assert labels.in_words() == "2 labels: a (1), b (2)" and labels.number("b") == 1
    assert found(10, 9, 2).names == ("2", "9", "10") and found("x", 10, 9).names == ("9", "10", "x")
    assert labels.problem_type == "single_label_classification"


def test_what_is_learned_is_seen_in_the_answers() -> None:
    assert found(1, 2.5).kind == "numbers" and found(1, 2.5).for_model == 1
    assert found(1, 2, regression=True).kind == found("1", "2.5", regression=True).kind == "numbers"
    several = found(["b"], [], ["a", "b"])
    assert several.kind == "several classes" and several.names == ("a", "b") and several.counts == {"a": 1, "b": 2}
    assert found(None, None) == Labels("preferences")
    words = find_labels(answers([["O", "X"], [0, 1]]), "token-classification")
    assert words == Labels("words", ("O", "X"), {"O": 1, "X": 1}) and words.problem_type is None


def test_tasks_without_labels_are_known_by_their_name() -> None:
    for task, kind in {"seq2seq-lm": "targets", "masked-lm": "hidden tokens", "embedding": "similar texts"}.items():
        labels = find_labels(answers(None, None), task)
        assert labels == Labels(kind) and labels.for_model is None and labels.problem_type is None and labels.in_words()
    mixed = Mixture([made({"texts": [1, 1]}, {"texts": [1, 1, 1]})])
    with pytest.raises(CheckpointError, match="some records have a negative, and others have none"):
        find_labels(mixed, "embedding")


@pytest.mark.parametrize(
    ("values", "regression", "error", "says"),
    [
        (("a", "a"), False, CheckpointError, "at least two different labels; all 2 have 'a'"),
        (("a", None), False, CheckpointError, "the records have classes and preferences to learn"),
        (("a", 2.5), False, CheckpointError, "label 'a' is not a number, which regression needs"),
        ((["a"], ["b"]), True, ConfigError, "--regression is for records with one label; got several classes"),
    ],
)
def test_records_of_several_kinds_are_refused(values: Any, regression: bool, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        found(*values, regression=regression)


def test_held_out_labels_must_be_known() -> None:
    check_known(found("a", "b"), answers("b"), SEQUENCES)
    with pytest.raises(CheckpointError, match=r"held-out records have the label 'c', which no record .* \(a, b\)"):
        check_known(found("a", "b"), answers("c"), SEQUENCES)
    with pytest.raises(CheckpointError, match="held-out records have preferences to learn, and those to train on cla"):
        check_known(found("a", "b"), answers(None), SEQUENCES)


def test_a_head_with_all_labels_keeps_their_order() -> None:
    labels = found("b", "a")
    assert labels_for(labels, ["b", "c", "a"]).names == ("b", "c", "a")
    assert labels_for(labels, ["LABEL_0", "LABEL_1"]) == labels_for(labels, None) == labels
