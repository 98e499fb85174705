"""Tokenizes records, with labels on the tokens that are learned.

    read_records(path) -> records -> tokenize_all(records, tokenizer) -> examples -> batches(examples, ...) -> tensors

A wrong record, or a chat template that cannot be used for it, raises CheckpointError; a wrong setting raises
ConfigError. The tokenizer is any object with the methods of `Tokenizer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qlora_lite.checks import is_count, require
from qlora_lite.data.chat.messages import ASSISTANT
from qlora_lite.data.encoding import Encoder, TokenizedExample, Tokenizer
from qlora_lite.data.records import PROMPT_ALONE, Record, check_record, read_records, shape_of
from qlora_lite.errors import CheckpointError


@dataclass(frozen=True)
class TokenizedSet:
    """Examples, and the effect of `max_length` on them.

    truncated: the number of examples that were truncated.
    dropped: the number of examples left out because no learned token was within `max_length`.
    split: the number of conversations that became several examples, since the chat template rewrites earlier turns.
    """

    examples: list[TokenizedExample]
    truncated: int
    dropped: int
    split: int = 0

    @property
    def longest(self) -> int:
        """The number of tokens of the longest example."""
        return max(len(example.input_ids) for example in self.examples)


def tokenize(
    record: Record, tokenizer: Tokenizer, max_length: int | None = None, completion_only: bool = True
) -> TokenizedExample:
    """Returns the tokens of one record, truncated to `max_length`, with labels on the tokens that are learned.

    completion_only: learn the assistant's turns, or the completion, up to and including the token that ends it;
        False learns every token. All tokens of a `text` are learned in either case.
    With a chat template, prompt and completion become a user and an assistant message. Without one they are
    concatenated and closed with EOS; instruction, input and output are separated by a blank line.
    Raises CheckpointError for a wrong record, and for one without a learned token within `max_length`.
    """
    found = tokenize_all([record], tokenizer, max_length, completion_only)
    if len(found.examples) > 1:
        raise CheckpointError(
            f"the chat template rewrites earlier turns, so the record becomes {len(found.examples)} examples; "
            f"use tokenize_all"
        )
    return found.examples[0]


def tokenize_all(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    max_length: int | None = None,
    completion_only: bool = True,
    prompts_too: bool = False,
) -> TokenizedSet:
    """Returns `tokenize` of many records. A record without a learned token within `max_length` is left out and counted.

    prompts_too: keep records without a learned token, such as a prompt alone or messages without an answer.
    Raises CheckpointError, with the record's number from 1, for a wrong record, and if no example is left.
    """
    require(max_length is None or is_count(max_length, 2), "max_length must be None or at least 2", max_length)
    examples: list[TokenizedExample] = []
    encoder = Encoder(tokenizer)
    truncated = dropped = split = 0
    for number, record in enumerate(records, 1):
        place = f"record {number}"
        check_record(record, place, prompts_too)
        wholes = _encode(record, encoder, completion_only, place, prompts_too)
        split += len(wholes) > 1
        for whole in wholes:
            example = TokenizedExample(whole.input_ids[:max_length], whole.labels[:max_length])
            if example.learned_tokens == 0 and not prompts_too:
                dropped += 1
                continue
            truncated += len(example.input_ids) < len(whole.input_ids)
            examples.append(example)
    if not examples:
        got = f"{dropped} records without a token to learn" if dropped else "no records"
        cut = f" within max_length {max_length}" if max_length else ""
        raise CheckpointError(f"there is nothing to train on: got {got}{cut}; give records with answers that fit")
    return TokenizedSet(examples, truncated, dropped, split)


def tokenize_file(
    path: str | Path,
    tokenizer: Tokenizer,
    max_length: int | None = None,
    completion_only: bool = True,
    prompts_too: bool = False,
) -> TokenizedSet:
    """Returns `tokenize_all` of the records of a JSONL file."""
    return tokenize_all(read_records(path, prompts_too), tokenizer, max_length, completion_only, prompts_too)


def _encode(
    record: Record, encoder: Encoder, completion_only: bool, place: str, prompts_too: bool
) -> list[TokenizedExample]:
    shape = shape_of(record, place, prompts_too)
    if shape == PROMPT_ALONE:
        return [encoder.prompt(record["prompt"], place)]
    if shape == ("messages",):
        return encoder.conversation(record, completion_only, place)
    if shape == ("text",):
        return [encoder.text("", record["text"], completion_only, place)]
    if shape == ("instruction", "output"):
        parts = (record["instruction"], record.get("input") or "")
        prompt = "\n\n".join(part for part in parts if part) + ("" if encoder.has_template else "\n\n")
        completion = record["output"]
    else:
        prompt, completion = record["prompt"], record["completion"]
    if not encoder.has_template:
        return [encoder.text(prompt, completion, completion_only, place)]
    messages = [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": completion}]
    return encoder.conversation({"messages": messages}, completion_only, place)
