"""Tests of records as tokens, against the positions of their characters and transformers' own tokenization."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.encoding import Encoder, TokenizedExample, special_tokens
from qlora_lite.data.records import check_record
from qlora_lite.data.shapes import Conversation
from qlora_lite.errors import CheckpointError, ConfigError

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

    def __len__(self) -> int:
        return len(self._fast)

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


def examples(tokens: Any, record: dict[str, Any], learn: str = "answers") -> list[TokenizedExample]:
    encoder = Encoder(tokens, learn)
    drafts = encoder.drafts(check_record(record))
    return [marked.example() for marked in (encoder.tokens(drafts) if isinstance(drafts, list) else [drafts])]


def learned(example: Any, tokens: Any) -> str:
    return str(tokens.decode([label for label in example.labels if label != IGNORE_INDEX])).replace(" ", "")


@pytest.mark.parametrize("wrap", [lambda fast: fast, Slow], ids=["offsets", "prefixes"])
def test_answers_and_their_ends_are_learned(wrap: Any) -> None:
    tokens = wrap(tokenizer())
    (example,) = examples(tokens, RECORD)
    assert learned(example, tokens) == "b.</s>d.</s>"
    assert example.input_ids.count(0) == 1  # one <s>


def test_all_tokens_are_learned_on_request() -> None:
    tokens = tokenizer()
    (example,) = examples(tokens, RECORD, "all")
    assert example.labels == example.input_ids


def test_an_answer_of_weight_0_is_not_learned() -> None:
    tokens = tokenizer()
    messages = [{**message, "weight": int(index == 3)} for index, message in enumerate(RECORD["messages"])]
    (example,) = examples(tokens, {"messages": messages})
    assert learned(example, tokens) == "d.</s>"
    (example,) = examples(tokens, {"messages": messages[:2]})
    assert learned(example, tokens) == ""


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_variables_reach_the_template(as_text: bool) -> None:
    tools = [{"type": "function", "function": {"name": "get_it", "parameters": None}}]
    record = {**RECORD, "tools": json.dumps(tools) if as_text else tools, "chat_template_kwargs": {"mood": "!"}}
    tokens = tokenizer()
    (example,) = examples(tokens, record)
    assert "[get_it]" in str(tokens.decode(example.input_ids)).replace(" ", "")
    assert learned(example, tokens) == "b.?u</s>d.?u</s>"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("tools", "{", r"record: tools must be a list, or JSON text of one, got '\{'"),
        ("tools", {"name": "f"}, "record: tools must be a list of objects"),
        ("documents", [3], "record: documents must be a list of objects"),
        ("chat_template_kwargs", [1], "record: chat_template_kwargs must be an object"),
    ],
)
def test_wrong_fields_are_named(field: str, value: object, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        examples(tokenizer(), {**RECORD, field: value})


@pytest.mark.parametrize("wrap", [lambda fast: fast, Slow], ids=["offsets", "prefixes"])
def test_text_gets_one_begin_and_one_end_whatever_it_has(wrap: Any) -> None:
    tokens = wrap(tokenizer(None))
    expected = [0, *tokens("ab", add_special_tokens=False)["input_ids"], 1]
    for text in ("ab", "<s>ab", "ab</s>", "<s>ab</s>"):
        (example,) = examples(tokens, {"text": text})
        assert example.input_ids == example.labels == expected, text
    (example,) = examples(tokens, {"prompt": "a", "completion": "b"})
    assert example.labels == [IGNORE_INDEX, IGNORE_INDEX, *expected[2:]]
    (example,) = examples(tokens, {"prompt": "a", "completion": "b"}, "all")
    assert example.labels == example.input_ids == expected


def test_the_last_answer_alone_is_learned_on_request() -> None:
    tokens = tokenizer()
    (example,) = examples(tokens, RECORD, "last-answer")
    assert learned(example, tokens) == "d.</s>"
    messages = [{**message, "weight": int(index == 1)} for index, message in enumerate(RECORD["messages"])]
    (example,) = examples(tokens, {"messages": messages}, "last-answer")
    assert learned(example, tokens) == ""
    with pytest.raises(ConfigError, match="learn must be one of all, answers, last-answer; got 'answer'"):
        Encoder(tokens, "answer")


def test_of_trls_prompts_nothing_is_learned_unless_all_is() -> None:
    tokens = tokenizer()
    record = {"prompt": RECORD["messages"][:3], "completion": RECORD["messages"][3:]}
    (example,) = examples(tokens, record)
    assert learned(example, tokens) == "d.</s>" and example.input_ids == examples(tokens, RECORD)[0].input_ids
    (example,) = examples(tokens, record, "all")
    assert example.labels == example.input_ids


def test_ready_tokens_stay_as_they_are() -> None:
    tokens = tokenizer()
    record = {"input_ids": [0, 5, 6, 7, 8], "labels": [-100, 5, -100, 7, 8], "attention_mask": [1, 1, 1, 1, 0]}
    assert examples(tokens, record) == [TokenizedExample([0, 5, 6, 7], [-100, 5, -100, 7])]
    assert examples(tokens, record, "all") == [TokenizedExample([0, 5, 6, 7], [0, 5, 6, 7])]
    with pytest.raises(CheckpointError, match=f"input_ids must be below {len(tokens)}, the tokenizer's size; got 9000"):
        examples(tokens, {"input_ids": [9000], "labels": [9000]})


def test_a_system_text_and_tools_need_the_template_or_stand_before_the_prompt() -> None:
    chat, plain = tokenizer(), tokenizer(None)
    record = {"system": "c", "prompt": "a", "completion": "b"}
    messages = [{"role": r, "content": c} for r, c in (("system", "c"), ("user", "a"), ("assistant", "b"))]
    assert examples(chat, record) == examples(chat, {"messages": messages})
    assert plain.decode(examples(plain, record)[0].input_ids, skip_special_tokens=True).replace(" ", "") == "c?u?uab"
    with pytest.raises(CheckpointError, match="got tools, but this tokenizer has no chat template"):
        examples(plain, record | {"tools": [{"name": "f"}]})


def test_a_batch_of_drafts_has_the_tokens_of_each_alone() -> None:
    for tokens in (tokenizer(), tokenizer(None)):
        encoder = Encoder(tokens)
        records = [
            {"text": "ab"},
            {"prompt": "a", "completion": "b"},
            {"text": "<s>b"},
            {"prompt": "ab", "completion": ""},
        ]
        drafts = [draft for record in records for draft in encoder.drafts(check_record(record))]
        assert encoder.tokens(drafts) == [encoder.tokens([draft])[0] for draft in drafts]


def test_truncation_in_the_tokenizers_file_does_not_cut_texts() -> None:
    tokens = tokenizer(None)
    whole = examples(tokens, {"text": "abcdefgh"})
    tokens.backend_tokenizer.enable_truncation(3)
    tokens.backend_tokenizer.enable_padding(length=20)
    assert examples(tokens, {"text": "abcdefgh"}) == whole


class Watched:
    """A tokenizer whose Rust part notes how many texts it gets, and whether positions are wanted."""

    def __init__(self, tokens: PreTrainedTokenizerFast) -> None:
        self._tokens = tokens
        self.calls: list[tuple[str, int]] = []
        self.backend_tokenizer = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokens, name, None) or getattr(self._tokens.backend_tokenizer, name)

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self.calls.append(("with positions", len(texts)))
        return self._tokens.backend_tokenizer.encode_batch(texts, **options)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.calls.append(("without", len(texts)))
        return self._tokens.backend_tokenizer.encode_batch_fast(texts, **options)


def test_positions_are_asked_for_only_where_tokens_do_not_spell_the_text() -> None:
    def chat(answer: str) -> Conversation:
        return Conversation([{"role": "user", "content": "a?"}, {"role": "assistant", "content": answer}], {})

    tokens = Watched(tokenizer())
    encoder, expected = Encoder(tokens), Encoder(Slow(tokenizer()))
    plain, unknown = ([encoder.drafts(chat(answer))[0] for answer in answers] for answers in ("bcd", "éüö"))
    batches = [plain, [*plain[:2], unknown[0]], unknown, plain]
    for batch, calls in zip(
        batches,
        [
            [("without", 3)],
            [("without", 3), ("with positions", 1)],
            [("without", 3), ("with positions", 3)],
            [("with positions", 3)],  # most of the batch before was tokenized twice
        ],
        strict=True,
    ):
        tokens.calls.clear()
        assert encoder.tokens(batch) == expected.tokens(batch)
        assert tokens.calls == calls


def test_special_tokens_are_those_that_the_tokenizer_knows() -> None:
    assert set(special_tokens(tokenizer())) == set(SPECIALS)
    assert special_tokens(object()) == []
