"""Tests of exact match: which answers are asked for, and that those of a model are found and others not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.errors import ConfigError
from qlora_lite.generation import compared_answers
from qlora_lite.generation.compared_answers import LONGEST_ANSWER, Question, exact_match, question_of, questions_of


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def example(tokenizer: Any, *parts: tuple[str, bool]) -> TokenizedExample:
    """Texts one after the other, and whether each is learned."""
    encoded = [(tokens_of(tokenizer, text), learned) for text, learned in parts]
    ids = [token for tokens, _ in encoded for token in tokens]
    return TokenizedExample(ids, [token if own else IGNORE_INDEX for tokens, own in encoded for token in tokens])


def test_the_last_answer_is_asked_for_in_the_tokens_of_training(tokenizer: Any) -> None:
    parts = (("a", False), ("b", True), ("cd", False), ("e?", True), ("g", False))
    found = question_of(example(tokenizer, *parts), tokenizer)
    assert found == Question(tokens_of(tokenizer, "abcd"), tokens_of(tokenizer, "e?"))
    for parts in ((("ab", True),), (("ab", False),), (("a", False), (" ", True))):
        assert question_of(example(tokenizer, *parts), tokenizer) is None
    long = [example(tokenizer, ("a", False), ("b" * length, True)) for length in (LONGEST_ANSWER, LONGEST_ANSWER + 1)]
    assert [question_of(one, tokenizer) is None for one in long] == [False, True]
    some = [example(tokenizer, ("q", False), (answer, True)) for answer in "abc"] * 2
    found_in = questions_of([long[1], *some], tokenizer, 4)
    assert [tokenizer.decode(question.answer) for question in found_in] == ["a", "b", "c", "a"]


def test_the_answers_of_a_model_are_its_own_where_it_ends_them(model: Any, tokenizer: Any) -> None:
    """The model writes the token after the one before, until token 30."""
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().roll(1, 0))
    model.generation_config.eos_token_id = 30
    own = [Question([40, start], [*range(start + 1, 31)]) for start in (20, 25, 28)]
    assert exact_match(model, tokenizer, own) == 1.0
    others = [Question([25], answer) for answer in ([26, 27, 28, 29, 31, 30], [26, 27, 30], [26, 27], [27, 26, 28, 29])]
    assert exact_match(model, tokenizer, [*own, *others]) == 3 / 7
    with pytest.raises(ConfigError, match="exact match needs at least one question"):
        exact_match(model, tokenizer, [])


def test_questions_of_similar_lengths_are_answered_together_within_the_positions_of_the_model() -> None:
    def sizes(room: int | None, one_length: bool = False) -> list[list[int]]:
        questions = [Question([0] * length, [0] * answer) for length, answer in ((9, 1), (3, 5), (1, 1), (5, 1))]
        return [[len(one.tokens) for one in batch] for batch in compared_answers._batches(questions, room, one_length)]

    assert sizes(None) == [[1, 3, 5, 9]] and sizes(11) == [[1, 3, 5], [9]]
    assert sizes(None, one_length=True) == [[1], [3], [5], [9]]
    many = [Question([0] * number, [0]) for number in range(1, 20)]
    assert [len(batch) for batch in compared_answers._batches(many, None, False)] == [8, 8, 3]


def test_a_model_that_reads_padding_is_asked_questions_of_one_length(
    small_model: Callable[..., Any], tokenizer: Any
) -> None:
    rwkv = small_model("RwkvConfig", vocab_size=105)
    questions = [Question([40] * length, [41]) for length in (2, 5, 2, 3)]
    assert 0 <= exact_match(rwkv, tokenizer, questions) <= 1
