"""Tests of the demo's task: splits share no open value, and the score forgives no wrong one."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "message_records.py"
    spec = importlib.util.spec_from_file_location("message_records", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


task = load()
SPLITS = ("train", "heldout")


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def message(example: Any) -> str:
    return str(example["messages"][1]["content"])


def test_tables_are_large_enough_and_share_nothing() -> None:
    for table in (task.PEOPLE, task.ITEMS):
        train, heldout = (set(table[split]) for split in SPLITS)
        assert len(table["train"]) == len(train) >= 60
        assert len(table["heldout"]) == len(heldout) >= 20
        assert not {name.lower() for name in train} & {name.lower() for name in heldout}
    for split, least in (("train", 40), ("heldout", 12)):
        assert len(task.templates(split)) == len(set(task.templates(split))) >= least
    train, heldout = ({sentence.lower() for _, sentence in task.templates(split)} for split in SPLITS)
    assert not train & heldout
    for split in SPLITS:
        assert {intent for intent, _ in task.templates(split)} == set(task.INTENTS)


def test_messages_of_one_split_mention_nobody_and_nothing_of_the_other() -> None:
    for split, other in (SPLITS, SPLITS[::-1]):
        foreign = {*task.PEOPLE[other], *task.ITEMS[other]}
        for example in task.generate(split, 600, seed=0):
            assert not words(message(example)) & foreign
    train, heldout = ({message(example) for example in task.generate(split, 600, seed=0)} for split in SPLITS)
    assert not train & heldout


@pytest.mark.parametrize("split", SPLITS)
def test_every_value_is_in_the_message_or_in_a_closed_set(split: str) -> None:
    number_of = {word: number for number, word in task.NUMBER_WORDS.items()}
    seen = set()
    for example in task.generate(split, 600, seed=3):
        record, said = task.target_record(example), message(example)
        assert tuple(record) == task.FIELDS
        assert record["person"] in task.PEOPLE[split] and record["person"] in words(said)
        assert record["item"] in task.ITEMS[split] and record["item"] in words(said)
        assert record["intent"] in task.INTENTS
        numbers = [number_of.get(word.lower(), word) for word in words(said)]
        assert [int(n) for n in numbers if str(n).isdigit()] == [record["quantity"]]
        assert [word.lower() for word in words(said) if word.lower() in task.DAYS] == (
            [record["day"]] if record["day"] else []
        )
        assert len(said.split()) <= 25 and "{" not in said and "  " not in said
        assert said[0] == said[0].upper()
        seen.add(record["intent"])
    assert seen == set(task.INTENTS)


def test_each_intent_has_messages_with_and_without_a_day() -> None:
    for split in SPLITS:
        records = [task.target_record(example) for example in task.generate(split, 200, seed=0)]
        for intent in task.INTENTS:
            days = {record["day"] is None for record in records if record["intent"] == intent}
            assert False in days, f"{split} {intent} never names a day"
        assert any(record["day"] is None for record in records)


def test_generation_is_a_function_of_its_arguments() -> None:
    assert task.generate("train", 70, seed=5) == task.generate("train", 70, seed=5)
    assert task.generate("train", 70, seed=5)[:20] == task.generate("train", 20, seed=5)
    assert task.generate("train", 70, seed=5) != task.generate("train", 70, seed=6)
    assert task.generate("heldout", 0, seed=0) == []
    count = len(task.templates("heldout"))
    spread = [task.target_record(example)["intent"] for example in task.generate("heldout", 2 * count, seed=0)]
    expected = [intent for intent, _ in task.templates("heldout")] * 2
    assert sorted(spread) == sorted(expected)
    with pytest.raises(ValueError, match="split must be one of train, heldout; got 'test'"):
        task.generate("test", 1, seed=0)


EXAMPLE = task.generate("heldout", 1, seed=0)[0]
TARGET = task.target_record(EXAMPLE)


def test_prompt_is_everything_but_the_answer() -> None:
    assert [m["role"] for m in task.prompt_messages(EXAMPLE)] == ["system", "user"]
    assert EXAMPLE["messages"] == [
        *task.prompt_messages(EXAMPLE),
        {"role": "assistant", "content": json.dumps(TARGET, separators=(",", ":"))},
    ]


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps(TARGET),
        json.dumps(TARGET, indent=2),
        json.dumps(dict(reversed(TARGET.items()))),
        f"Sure:\n```json\n{json.dumps(TARGET)}\n```\nAnything else?",
    ],
)
def test_the_record_is_accepted_however_it_is_laid_out(answer: str) -> None:
    assert task.exact_match(answer, EXAMPLE)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "{",
        "I do not know.",
        json.dumps(TARGET)[:-1],
        json.dumps(TARGET).replace('"', "'"),
        json.dumps([*TARGET.values()]),
        json.dumps({key: value for key, value in TARGET.items() if key != "day"}),
        json.dumps(TARGET | {"note": ""}),
        json.dumps(TARGET | {"quantity": str(TARGET["quantity"])}),
        json.dumps(TARGET | {"quantity": float(TARGET["quantity"])}),
        json.dumps(TARGET | {"person": TARGET["person"].lower()}),
        json.dumps(TARGET | {"day": "someday"}),
        "{}" + json.dumps(TARGET),
        '{"a":' * 100_000,
    ],
)
def test_wrong_or_malformed_answers_are_rejected(answer: str) -> None:
    assert not task.exact_match(answer, EXAMPLE)


@given(st.text() | st.text(alphabet='{}[]":,0aetrunl '))
def test_no_text_breaks_the_score(answer: str) -> None:
    assert not task.exact_match(answer, EXAMPLE)
