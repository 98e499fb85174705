"""Tests of Prompts: the tokens are those of training, and the tokens that end an answer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data import tokenize_all
from qlora_lite.data.records import check_record
from qlora_lite.errors import CheckpointError
from qlora_lite.generation.prompts import Prompts

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
CHATS: list[dict[str, Any]] = [
    {"messages": CHAT},
    {"messages": CHAT * 2},
    {"prompt": CHAT[:1], "completion": CHAT[1:], "system": "z"},
]
TEXTS = [
    {"prompt": "How? ", "completion": "So."},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"prompt": "Be.", "completion": "I am.", "system": "Short."},
]


@pytest.mark.parametrize("record", [*CHATS, *TEXTS], ids=lambda record: "-".join(record))
def test_prompt_and_what_is_learned_make_the_example(tokenizer: Any, record: dict[str, Any]) -> None:
    """A model that learned a record sees the same tokens when it is asked."""
    if record in TEXTS:
        tokenizer = without_template(tokenizer)
    (*_, example) = tokenize_all([record], tokenizer).examples
    learned = [place for place, label in enumerate(example.labels) if label != IGNORE_INDEX]
    last = max(place for place in learned if place - 1 not in learned)
    prompt = Prompts(tokenizer).of_record(check_record(record))
    assert prompt.tokens == example.input_ids[:last]
    assert "".join(tokenizer.convert_ids_to_tokens(example.input_ids[last:])) == f"{prompt.expected}</s>"


def without_template(tokenizer: Any) -> Any:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    return bare


def test_a_prompt_of_text_is_a_message_where_there_is_a_template(tokenizer: Any) -> None:
    asked = Prompts(tokenizer).of_record(check_record({"prompt": "Be.", "completion": "I am.", "system": "Short."}))
    assert asked.tokens == tokenizer("<system>Short.</s><user>Be.</s><assistant>")["input_ids"]
    assert asked.shown == "Be." and asked.expected == "I am."
    alone = Prompts(tokenizer).of_record(check_record({"prompt": "Be."}, prompts_too=True))
    assert alone.tokens == tokenizer("<user>Be.</s><assistant>")["input_ids"] and alone.expected is None


def test_a_text_goes_on_as_it_is(tokenizer: Any) -> None:
    prompt = Prompts(tokenizer).of_record(check_record({"text": "Once upon"}))
    assert prompt.tokens == tokenizer("Once upon")["input_ids"] and prompt.shown == "Once upon"


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"input_ids": [5], "labels": [5]}, "has tokens and no text to answer; give messages, a prompt or a text"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "has an answer and nothing before it; give a message"),
        ({"text": ""}, "the prompt has no tokens; give one that is not empty"),
    ],
)
def test_what_asks_nothing_is_refused(tokenizer: Any, record: dict[str, Any], error: str) -> None:
    with pytest.raises(CheckpointError, match=error):
        Prompts(tokenizer).of_record(check_record(record))


def test_without_a_template_there_are_no_conversations(tokenizer: Any) -> None:
    with pytest.raises(CheckpointError, match="this tokenizer has no chat template; name an instruct model, put the"):
        Prompts(without_template(tokenizer)).of_conversation([{"role": "user", "content": "a"}])


def test_the_end_of_a_turn_ends_an_answer(word_tokenizer: Callable[..., Any]) -> None:
    """A base model's config often names another end than the chat template writes."""
    template = "{% for m in messages %}{{ m.role + ' ' + m.content + ' <end> ' }}{% endfor %}"
    words = word_tokenizer(template, "question answer <end>")
    words.add_special_tokens({"additional_special_tokens": ["<end>"]})
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[3, 4]))
    end = words.convert_tokens_to_ids("<end>")
    assert Prompts(words).stop_tokens(model) == [3, 4, words.eos_token_id, end]
    model.generation_config.eos_token_id = words.eos_token_id
    words.chat_template = None
    assert Prompts(words).stop_tokens(model) == [words.eos_token_id]
