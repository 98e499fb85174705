"""Tests of records as tokens, against the positions of their characters and transformers' own tokenization."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.encoding import Encoder, special_tokens
from qlora_lite.errors import CheckpointError

TEMPLATE = (
    "{{ bos_token }}{% if tools %}[{% for tool in tools %}{{ tool.function.name }}{% endfor %}]{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ mood or '' }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIALS = ["<s>", "</s>", "<user>", "<assistant>"]


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token for each character; `<s>` is put first where special tokens are asked for."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz .?[]_"))
    core = Tokenizer(models.WordLevel({t: n for n, t in enumerate([*SPECIALS, "?u", *letters])}, unk_token="?u"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.add_special_tokens(SPECIALS)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template
    )


class Slow:
    """The same tokenizer without the places of its tokens."""

    is_fast = False

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self._fast = fast

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        return self._fast(text, add_special_tokens=add_special_tokens)


RECORD = {
    "messages": [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b."},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "d."},
    ]
}


def learned(example: Any, tokens: Any) -> str:
    return str(tokens.decode([label for label in example.labels if label != IGNORE_INDEX])).replace(" ", "")


@pytest.mark.parametrize("wrap", [lambda fast: fast, Slow], ids=["offsets", "prefixes"])
def test_answers_and_their_ends_are_learned(wrap: Any) -> None:
    tokens = wrap(tokenizer())
    (example,) = Encoder(tokens).conversation(RECORD, True, "record 1")
    assert learned(example, tokens) == "b.</s>d.</s>"
    assert example.input_ids.count(0) == 1  # one <s>


def test_all_tokens_are_learned_on_request() -> None:
    tokens = tokenizer()
    (example,) = Encoder(tokens).conversation(RECORD, False, "record 1")
    assert example.labels == example.input_ids


def test_an_answer_of_weight_0_is_not_learned() -> None:
    tokens = tokenizer()
    messages = [{**message, "weight": int(index == 3)} for index, message in enumerate(RECORD["messages"])]
    (example,) = Encoder(tokens).conversation({"messages": messages}, True, "record 1")
    assert learned(example, tokens) == "d.</s>"
    (example,) = Encoder(tokens).conversation({"messages": messages[:2]}, True, "record 1")
    assert learned(example, tokens) == ""


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_variables_reach_the_template(as_text: bool) -> None:
    tools = [{"type": "function", "function": {"name": "get_it", "parameters": None}}]
    record = {**RECORD, "tools": json.dumps(tools) if as_text else tools, "chat_template_kwargs": {"mood": "!"}}
    tokens = tokenizer()
    (example,) = Encoder(tokens).conversation(record, True, "record 1")
    assert "[get_it]" in str(tokens.decode(example.input_ids)).replace(" ", "")
    assert learned(example, tokens) == "b.?u</s>d.?u</s>"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("tools", "{", r"record 1: tools must be a list or JSON text, got '\{'"),
        ("tools", {"name": "f"}, "record 1: tools must be a list of objects"),
        ("documents", [3], "record 1: documents must be a list of objects"),
        ("chat_template_kwargs", [1], "record 1: chat_template_kwargs must be an object"),
    ],
)
def test_wrong_fields_are_named(field: str, value: object, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        Encoder(tokenizer()).conversation({**RECORD, field: value}, True, "record 1")


def test_text_gets_one_begin_and_one_end_whatever_it_has() -> None:
    tokens = tokenizer(None)
    expected = [0, *tokens("ab", add_special_tokens=False)["input_ids"], 1]
    for text in ("ab", "<s>ab", "ab</s>", "<s>ab</s>"):
        assert Encoder(tokens).text("", text, True, "record 1").input_ids == expected, text
    assert Encoder(tokens).text("a", "b", True, "record 1").labels == [IGNORE_INDEX, IGNORE_INDEX, *expected[2:]]


def test_special_tokens_are_those_that_the_tokenizer_knows() -> None:
    assert set(special_tokens(tokenizer())) == set(SPECIALS)
    assert special_tokens(object()) == []
