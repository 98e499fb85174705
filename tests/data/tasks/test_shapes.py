"""Tests of the shapes of records with labels, and of the sentences about others."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_lite.data.shapes import Part, shape_of
from qlora_lite.data.tasks.shapes import PAIRS, TASK_KEYS, task_shape_of
from qlora_lite.errors import CheckpointError

SEQUENCES, WORDS = "sequence-classification", "token-classification"


def read(record: dict[str, Any], task: str = SEQUENCES) -> tuple[Any, Any]:
    found: Any = task_shape_of(task, record, "line 1").read(record, "line 1")
    return found.parts, found.answer


def test_texts_and_their_labels() -> None:
    assert read({"text": "a", "label": "x"}) == ((Part("a"),), "x")
    assert read({"text": "a", "label": 3}) == ((Part("a"),), 3)
    assert read({"text": "a", "label": 0.5}) == ((Part("a"),), 0.5)
    assert read({"text": "a", "label": True}) == ((Part("a"),), "true")
    assert read({"text": "a", "labels": '["x", 2]'}) == ((Part("a"),), ["x", 2])
    for one, other in PAIRS:
        assert read({one: "a", other: "b", "label": 1}) == ((Part("a", "b"),), 1)
    assert read({"tokens": ["a", "b"], "labels": ["O", 1]}, WORDS) == ((Part(words=("a", "b")),), ["O", 1])
    ((chat,), label) = read({"messages": [{"role": "user", "content": "hi"}], "label": "x"})
    assert chat.conversation.messages == [{"role": "user", "content": "hi"}] and label == "x"


def test_texts_of_tasks_without_labels() -> None:
    target = (Part("b", target=True),)
    assert read({"prompt": "a", "completion": "b"}, "seq2seq-lm") == ((Part("a"), *target), None)
    assert read({"input": "a", "target": "b"}, "seq2seq-lm") == ((Part("a"), *target), None)
    record = {"instruction": "do", "input": "a", "output": "b"}
    assert read(record, "seq2seq-lm") == ((Part("do\n\na"), *target), None)
    assert read({"anchor": "a", "positive": "b"}, "embedding") == ((Part("a"), Part("b")), None)
    assert len(read({"anchor": "a", "positive": "b", "negative": "c"}, "embedding")[0]) == 3
    assert read({"text": "a", "label": "ignored"}, "masked-lm") == ((Part("a"),), None)


def test_preferences_are_texts_or_chats_with_or_without_a_prompt() -> None:
    pair = {"chosen": "yes", "rejected": "no"}
    assert read(pair) == ((Part("yes", ends=True), Part("no", ends=True)), None)
    assert read({"prompt": "q", **pair})[0] == (Part("q", "yes", ends=True), Part("q", "no", ends=True))
    ask, answers = {"role": "user", "content": "q"}, [[{"role": "assistant", "content": text}] for text in "yn"]
    whole = {"chosen": [ask, *answers[0]], "rejected": [ask, *answers[1]]}
    apart = {"prompt": [ask], "chosen": answers[0], "rejected": answers[1]}
    text = {"prompt": [ask], "chosen": "y", "rejected": "n"}
    expected = [[ask, *answer] for answer in answers]
    for record in (whole, apart, text):
        assert [part.conversation.messages for part in read(record)[0]] == expected


@pytest.mark.parametrize(
    ("record", "task", "says"),
    [
        ({"text": "a", "label": ""}, SEQUENCES, "label must be a name or a finite number, got ''"),
        ({"text": "a", "label": float("nan")}, SEQUENCES, "must be a name or a finite number, got nan"),
        ({"text": "a", "labels": "x"}, SEQUENCES, "labels must be a list, or JSON text of one"),
        ({"text": 3, "label": "x"}, SEQUENCES, "text must be a string"),
        ({"chosen": "a", "rejected": "a"}, SEQUENCES, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}, SEQUENCES, "prompt must be a"),
        ({"tokens": ["a"], "labels": ["O", "O"]}, WORDS, "labels must be one for each of the 1 tokens, got 2 labels"),
        ({"tokens": ["a", " "], "labels": ["O", "O"]}, WORDS, "tokens must be a list of words"),
        ({"tokens": ["a"], "labels": [1.5]}, WORDS, "labels must be names or whole numbers, got 1.5"),
        (
            {"prompt": "a", "completion": "b"},
            SEQUENCES,
            "has keys completion, prompt, and the task sequence-classification needs one of: .*text, label.*; "
            "--task causal-lm or seq2seq-lm takes such records",
        ),
        ({"tokens": ["a"], "labels": ["O"]}, SEQUENCES, "--task token-classification takes such records"),
        ({"text": "a", "label": "x"}, WORDS, "needs one of: tokens, labels; --task .*sequence-classification.* takes"),
    ],
)
def test_wrong_records_get_one_sentence(record: dict[str, Any], task: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"^line 1: .*{says}"):
        read(record, task)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"text": "a", "label": "x"}, "has a text and its label, which --task sequence-classification learns"),
        ({"text": "a", "labels": ["x"]}, "remove the key labels"),
        ({"chosen": "a", "rejected": "b"}, "of which --task sequence-classification learns a reward"),
        ({"tokens": ["a"], "labels": ["O"]}, "which --task token-classification learns"),
    ],
)
def test_a_causal_model_refuses_labels_and_says_which_task_takes_them(record: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        shape_of(record, "line 1")


def test_the_keys_that_may_be_mapped_are_those_of_all_tasks() -> None:
    assert {"text", "label", "labels", "tokens", "premise", "chosen", "prompt"} <= set(TASK_KEYS)
