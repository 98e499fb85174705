"""Tests of the tokens of texts against transformers' own call of the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_lite.data.shapes import Answered, Conversation, Part
from qlora_lite.data.tasks.encoding import TaskEncoder
from qlora_lite.data.tasks.examples import TaskExample, TaskExamples
from qlora_lite.data.token_arrays import TokenWriter
from qlora_lite.errors import CheckpointError


@pytest.fixture(scope="module")
def bert() -> Any:
    """A tokenizer with BERT's special tokens and types of tokens."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdef"]
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def encoded(tokenizer: Any, *contents: Answered, max_length: int | None = None) -> list[TaskExample]:
    encoder, writer = TaskEncoder(tokenizer, max_length), TokenWriter()
    drafts = [draft for content in contents for draft in encoder.drafts(content)]
    for number, marked in enumerate(encoder.tokens(drafts)):
        writer.append(number, [marked])
    found = TaskExamples(writer.finish()[0])
    return [found.made(number) for number in range(len(found))]


def test_texts_and_pairs_are_those_of_the_tokenizer_also_when_they_are_cut(bert: Any) -> None:
    contents = [Answered((Part("a b c d e"),), "x"), Answered((Part("a b c", "d e f"),), 2), Answered((Part("a"),), 1)]
    for limit in (None, 6, 5):
        rows = encoded(bert, *contents, max_length=limit)
        cut: dict[str, Any] = {} if limit is None else {"truncation": "longest_first", "max_length": limit}
        for row, words in zip(rows, (("a b c d e",), ("a b c", "d e f"), ("a",)), strict=True):
            expected = bert(*words, **cut)
            assert row.texts == [expected["input_ids"]]
            types = expected["token_type_ids"]
            assert row.second == (types.index(1) if 1 in types else None)
        assert [row.answer for row in rows] == ["x", 2, 1]
        assert [row.shortened for row in rows] == [limit is not None, limit is not None, False]


def test_each_word_is_labelled_on_its_first_token(tiny_folder: Path, bert: Any) -> None:
    from qlora_lite.checkpoints.hub import load_tokenizer

    words, labels = ("ab", "c"), ["X", "Y"]
    (example,) = encoded(load_tokenizer(tiny_folder), Answered((Part(words=words),), labels))
    text = load_tokenizer(tiny_folder).convert_ids_to_tokens(example.texts[0])
    first = [word for word in example.answer[1] if word >= 0]
    assert first == [0, 1] and len(example.answer[1]) == len(text) and example.answer[0] == labels
    assert text[example.answer[1].index(1)].strip() == "c", "one token a character"
    (example,) = encoded(bert, Answered((Part(words=("a", "b", "c", "d")),), [0, 1, 0, 1]), max_length=4)
    assert example.texts == [[1, 4, 5, 2]] and example.answer[1] == [-1, 0, 1, -1], "cut, with the special tokens"


def test_preferences_have_two_texts_which_the_template_writes_or_an_end_closes(
    word_tokenizer: Callable[..., Any],
) -> None:
    plain, chat = word_tokenizer(None), word_tokenizer()
    pair = Answered((Part("a", " b", ends=True), Part("a", " c </s>", ends=True)))
    (example,) = encoded(plain, pair)
    assert plain.batch_decode(example.texts) == ["a b </s>", "a c </s>"], "one end, also where the text has it"
    (example,) = encoded(chat, Answered((Part("a", "b", ends=True), Part("a", "c", ends=True))))
    assert chat.decode(example.texts[1]) == "user a </s> assistant c </s>"
    talk = Conversation([{"role": "user", "content": "a"}], {})
    assert chat.decode(encoded(chat, Answered((Part(conversation=talk),), 1))[0].texts[0]) == "user a </s>"
    with pytest.raises(CheckpointError, match="got messages, but this tokenizer has no chat template"):
        encoded(plain, Answered((Part(conversation=talk),), 1))


def test_a_text_without_tokens_gives_no_example(word_tokenizer: Callable[..., Any]) -> None:
    encoder = TaskEncoder(word_tokenizer(None), None)
    (made,) = encoder.tokens(encoder.drafts(Answered((Part(" "),), 1)))
    assert made.ids == []
