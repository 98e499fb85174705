"""Exact match: how often a model writes the answers of tokenized examples, by the likeliest token each time.

The prompt of an example is what comes before its last answer, in the tokens that training has. Texts are compared,
without special tokens and without spaces around them, so that another division into tokens makes no difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lite.checks import require
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.generation.answering import answer_batch, decoded, reads_padding
from qlora_lite.generation.prompts import Prompts
from qlora_lite.generation.settings import GenerationSettings
from qlora_lite.positions import longest_sequence
from qlora_lite.progress.work import working

LONGEST_ANSWER = 64  # tokens, with the one that ends it
ROWS = 8
# A model that does not end its answer in time writes one token more, and so another text.
ONE_MORE = 1


@dataclass(frozen=True)
class Question:
    """What a model is asked, and its right answer, with the token that ends it."""

    tokens: list[int]
    answer: list[int]


def question_of(example: TokenizedExample, tokenizer: Any) -> Question | None:
    """Returns the last answer of an example as a question; None if nothing is before it, if it is long, or empty."""
    learned = [label != IGNORE_INDEX for label in example.labels]
    end = next((place for place in range(len(learned), 0, -1) if learned[place - 1]), 0)
    begin = next((place for place in range(end, 0, -1) if not learned[place - 1]), 0)
    answer = example.input_ids[begin:end]
    if begin == 0 or len(answer) > LONGEST_ANSWER or not decoded(tokenizer, answer).strip() or example.images:
        return None
    return Question(example.input_ids[:begin], answer)


def questions_of(examples: Iterable[TokenizedExample], tokenizer: Any, most: int) -> list[Question]:
    """Returns the questions of the first examples that have one (`question_of`), `most` of them."""
    found = (question_of(example, tokenizer) for example in examples)
    return list(itertools.islice((question for question in found if question is not None), most))


def exact_match(model: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """Returns the share of questions that the model answers exactly. Its mode must be that of evaluation.

    Raises ConfigError without questions, and for a model that is not a causal language model.
    """
    require(len(questions) > 0, "exact match needs at least one question", len(questions))
    prompts, right, room = Prompts(tokenizer), 0, longest_sequence(model.config)
    stop = set(prompts.stop_tokens(model))
    with working("answering", len(questions), "questions") as work:
        for batch in _batches(questions, room, reads_padding(model)):
            left = _new_tokens(batch) if room is None else room - len(batch[-1].tokens)
            settings = GenerationSettings(min(_new_tokens(batch), left), temperature=0)
            answers = answer_batch(model, prompts, [question.tokens for question in batch], settings)
            expected = (decoded(tokenizer, _ended(question.answer, stop)) for question in batch)
            right += sum(made.text.strip() == text.strip() for made, text in zip(answers, expected, strict=True))
            work.advance(len(batch))
    return right / len(questions)


def _ended(answer: Sequence[int], stop: Collection[int]) -> list[int]:
    """Returns the tokens before the one that ends an answer."""
    return list(itertools.takewhile(lambda token: token not in stop, answer))


def _new_tokens(batch: Sequence[Question]) -> int:
    return max(len(question.answer) for question in batch) + ONE_MORE


def _batches(questions: Sequence[Question], room: int | None, one_length: bool) -> Iterator[list[Question]]:
    """Yields questions of similar lengths together, or of one length.

    room: the positions of the model, which limit a batch.
    """
    batch: list[Question] = []
    for question in sorted(questions, key=lambda question: len(question.tokens)):
        grown = [*batch, question]
        is_long = room is not None and len(question.tokens) + _new_tokens(grown) > room
        is_longer = one_length and len(question.tokens) > len(grown[0].tokens)
        if batch and (len(grown) > ROWS or is_long or is_longer):
            yield batch
            grown = [question]
        batch = grown
    yield batch
