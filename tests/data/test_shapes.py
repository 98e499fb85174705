"""Tests of the shapes of records, with rows as sharegpt, trl, alpaca and preference data sets have them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_lite.data.records import check_record
from qlora_lite.data.shapes import SHAPES_IN_WORDS, Conversation, Exchange, Tokens, shape_of
from qlora_lite.errors import CheckpointError

ASKED = {"role": "user", "content": "a?"}
ANSWERED = {"role": "assistant", "content": "b."}
CALL = {"name": "get", "arguments": {"x": 1}}
CALLED = {"type": "function", "function": CALL}
TOOL = {"type": "function", "function": {"name": "get"}}


CHAT = Conversation([ASKED, ANSWERED], {})


def turns(*pairs: tuple[str, object]) -> list[dict[str, object]]:
    return [{"from": said, "value": value} for said, value in pairs]


def conversation(*messages: dict[str, Any], **given: Any) -> Conversation:
    return Conversation(list(messages), given)


CASES: list[tuple[str, dict[str, Any], object]] = [
    ("messages", {"messages": [ASKED, ANSWERED]}, conversation(ASKED, ANSWERED)),
    ("messages in a cell", {"messages": json.dumps([ASKED, ANSWERED])}, conversation(ASKED, ANSWERED)),
    (
        "system beside messages",
        {"messages": [ASKED, ANSWERED], "system": "s"},
        conversation({"role": "system", "content": "s"}, ASKED, ANSWERED),
    ),
    ("sharegpt", {"conversations": turns(("human", "a?"), ("gpt", "b."))}, conversation(ASKED, ANSWERED)),
    (
        "sharegpt with a system text of its own key, null tools",
        {"conversations": turns(("human", "a?"), ("gpt", "b.")), "system": "s", "tools": None},
        conversation({"role": "system", "content": "s"}, ASKED, ANSWERED),
    ),
    (
        "sharegpt with calls",
        {
            "conversations": turns(
                ("system", "s"),
                ("human", "a?"),
                ("function_call", json.dumps(CALL)),
                ("observation", "3"),
                ("gpt", "b."),
            ),
            "tools": json.dumps([TOOL]),
        },
        conversation(
            {"role": "system", "content": "s"},
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [CALLED]},
            {"role": "tool", "content": "3"},
            ANSWERED,
            tools=[TOOL],
        ),
    ),
    (
        "sharegpt with a weight",
        {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b.", "weight": 0}]},
        conversation(ASKED, ANSWERED | {"weight": 0}),
    ),
    ("conversations with roles", {"conversations": [ASKED, ANSWERED]}, conversation(ASKED, ANSWERED)),
    (
        "trl's conversational prompt and completion",
        {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]},
        Conversation([ASKED, ANSWERED, ASKED, ANSWERED], {}, prompt=3),
    ),
    ("prompt and completion", {"prompt": "a", "completion": "b"}, Exchange("a", "b")),
    ("alpaca", {"instruction": "a", "input": "c", "output": "b"}, Exchange("a\n\nc", "b", "\n\n")),
    ("alpaca without input", {"instruction": "a", "input": "", "output": "b"}, Exchange("a", "b", "\n\n")),
    ("alpaca of Arrow", {"instruction": "a", "input": None, "output": "b"}, Exchange("a", "b", "\n\n")),
    ("text", {"text": "a"}, Exchange("", "a")),
    ("tokens", {"input_ids": [1, 2], "labels": [-100, 2]}, Tokens([1, 2], [False, True])),
    ("padded tokens", {"input_ids": [1, 0], "labels": [1, -100], "attention_mask": [1, 0]}, Tokens([1], [True])),
    ("tokens in cells", {"input_ids": "[1, 2]", "labels": "[-100, 2]"}, Tokens([1, 2], [False, True])),
    (
        "chosen beside messages",
        {"messages": [ASKED, ANSWERED], "chosen": "x", "rejected": "y"},
        conversation(ASKED, ANSWERED),
    ),
]


@pytest.mark.parametrize(("record", "content"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_records_are_read(record: dict[str, Any], content: object) -> None:
    assert check_record(record) == content


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"chosen": "a", "rejected": "b", "prompt": "c"},
        "is a preference pair (chosen, rejected), of which --task sequence-",
    ),
    ({"prompt": "a", "completion": "b", "label": False}, "are an unpaired preference, which trl's KTOTrainer takes"),
    ({"messages": "[{"}, "messages must be a list, or JSON text of one, got '[{'"),
    ({"conversations": {}}, "conversations must be a list of {from, value}, at least one, got dict {}"),
    ({"conversations": ["hi"]}, "conversations[0] must be {from, value}, got 'hi'"),
    ({"conversations": turns(("narrator", "x"))}, "conversations[0].from must be one of assistant, bot, "),
    ({"conversations": turns(("human", 3))}, "messages[0].content must be a string, got int 3"),
    ({"conversations": turns(("function_call", "get it"))}, "conversations[0].value must be a list, or JSON text"),
    (
        {"messages": [{"role": "system", "content": "s"}, ASKED], "system": "t"},
        "has a system message and a key system; remove one of them",
    ),
    ({"prompt": [ASKED], "completion": []}, "completion must be a list of messages, as prompt is; got []"),
    ({"prompt": "a", "completion": ["b"]}, "completion must be a string, got list ['b']"),
    ({"input_ids": [1, 2], "labels": [1]}, "must be equally long, at least one token; got 2 input_ids, 1 labels"),
    ({"input_ids": [], "labels": []}, "must be equally long, at least one token; got 0 input_ids"),
    (
        {"input_ids": [1, 2], "labels": [2, -100]},
        "its token or -100, not shifted; got label 2 for token 1 at 0",
    ),
    ({"input_ids": [1, 2.5], "labels": [1, 2]}, "input_ids must be a list of integers, got [1, 2.5]"),
    ({"input_ids": [-1], "labels": [-1]}, "got label -1 for token -1 at 0"),
    ({"input_ids": [1], "labels": [1], "attention_mask": [0]}, "attention_mask leaves no token"),
    ({"text": "a\ud800"}, "text must be valid Unicode"),
    ({"instruction": "a", "input": ["b"], "output": "c"}, "input must be a string, got list ['b']"),
    ({"question": "a"}, f"unknown shape with keys question; use one of: {SHAPES_IN_WORDS}; or map keys with --field"),
]


@pytest.mark.parametrize(("record", "says"), WRONG)
def test_wrong_records_are_refused_in_a_sentence(record: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_record(record, "here")
    assert str(caught.value).startswith("here: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_first_shape_is_taken() -> None:
    assert shape_of({"messages": [], "text": "", "prompt": "", "completion": ""}, "x").name == "messages"
    assert shape_of({"text": "", "prompt": "", "completion": ""}, "x").name == "prompt and completion"
    assert shape_of({"prompt": ""}, "x", prompts_too=True).name == "prompt"
