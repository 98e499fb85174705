"""Records -> token batches.

    read_records(path) -> records -> tokenize_all(records, tokenizer) -> examples -> batches(examples, ...) -> tensors

What is wrong in a record, or in the way a tokenizer's chat template writes it, raises CheckpointError;
a setting that cannot be, ConfigError. The tokenizer is any object with the methods of `Tokenizer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qlora_lite.checkpoints.files import excerpt
from qlora_lite.checks import is_count, require
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.records import PROMPT_ALONE, Record, check_record, shape_of
from qlora_lite.errors import CheckpointError

Batch = dict[str, torch.Tensor]


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any
    eos_token_id: Any

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...
    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...
    def decode(self, token_ids: list[int]) -> Any: ...


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids, and for each token itself where it is to be learned, IGNORE_INDEX elsewhere (not shifted)."""

    input_ids: list[int]
    labels: list[int]

    def __post_init__(self) -> None:
        ids, labels = len(self.input_ids), len(self.labels)
        require(ids == labels > 0, "an example needs as many labels as input_ids, at least one", (ids, labels))

    @property
    def learned_tokens(self) -> int:
        """How many tokens the loss counts; never the first, because nothing precedes it that could predict it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True)
class TokenizedSet:
    """Examples, and what `max_length` did: how many were cut, and how many left out as nothing learned remained."""

    examples: list[TokenizedExample]
    truncated: int
    dropped: int


def tokenize(
    record: Record, tokenizer: Tokenizer, max_length: int | None = None, completion_only: bool = True
) -> TokenizedExample:
    """The tokens of one record, cut to `max_length`, with labels on what is to be learned.

    completion_only: learn the assistant's turns, or the completion, up to and including the token that ends it;
        False learns every token. `text` is always learned whole.
    With a chat template, prompt and completion become a user and an assistant message; without one they are
    written one after the other, as they are, and closed with EOS (instruction, input and output with a blank
    line between). Raises CheckpointError for a wrong record, or one of which nothing learned is left.
    """
    found = tokenize_all([record], tokenizer, max_length, completion_only)
    return found.examples[0]


def tokenize_all(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    max_length: int | None = None,
    completion_only: bool = True,
    prompts_too: bool = False,
) -> TokenizedSet:
    """`tokenize` for many records; one whose learned tokens are all cut off is left out and counted.

    prompts_too: such a one stays, as does what has nothing to learn, a prompt alone or messages without an answer.
    Raises CheckpointError, with the record's number counted from 1, for a wrong one, and when none is left.
    """
    require(max_length is None or is_count(max_length, 2), "max_length must be None or at least 2", max_length)
    examples: list[TokenizedExample] = []
    truncated = dropped = 0
    for number, record in enumerate(records, 1):
        place = f"record {number}"
        check_record(record, place, prompts_too)
        whole = _encode(record, tokenizer, completion_only, place, prompts_too)
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
    return TokenizedSet(examples, truncated, dropped)


def _encode(
    record: Record, tokenizer: Tokenizer, completion_only: bool, place: str, prompts_too: bool
) -> TokenizedExample:
    shape = shape_of(record, place, prompts_too)
    if shape == PROMPT_ALONE:
        return _encode_prompt(record["prompt"], tokenizer, place)
    if shape == ("messages",):
        return _encode_messages(record["messages"], tokenizer, completion_only, place)
    if shape == ("text",):
        return _encode_plain("", record["text"], tokenizer, completion_only, place)
    prompt, completion = record[shape[0]], record[shape[1]]
    templated = tokenizer.chat_template is not None
    if shape == ("instruction", "output"):
        given = (prompt, record.get("input") or "")
        prompt = "\n\n".join(part for part in given if part) + ("" if templated else "\n\n")
    if not templated:
        return _encode_plain(prompt, completion, tokenizer, completion_only, place)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _encode_messages(messages, tokenizer, completion_only, place)


def _encode_prompt(prompt: str, tokenizer: Tokenizer, place: str) -> TokenizedExample:
    """A question as a model sees it that is about to answer; nothing in it is learned."""
    if tokenizer.chat_template is None:
        ids = _without_end(_token_ids(prompt, tokenizer, add_special_tokens=True), _end_token(tokenizer, place))
    else:
        text = _written([{"role": "user", "content": prompt}], tokenizer, True, place)
        ids = _token_ids(text, tokenizer, add_special_tokens=False)
    if not ids:
        raise CheckpointError(f"{place}: the prompt has no tokens; got {excerpt(prompt)}; write one that is not empty")
    return TokenizedExample(ids, [IGNORE_INDEX] * len(ids))


def _encode_plain(
    prompt: str, completion: str, tokenizer: Tokenizer, completion_only: bool, place: str
) -> TokenizedExample:
    """`prompt` then `completion` then EOS; an empty prompt leaves everything to be learned."""
    end = _end_token(tokenizer, place)
    # Some tokenizers close what they are given themselves.
    prompt_ids = _without_end(_token_ids(prompt, tokenizer, add_special_tokens=True), end)
    ids = _without_end(_token_ids(prompt + completion, tokenizer, add_special_tokens=True), end)
    if ids[: len(prompt_ids)] != prompt_ids:
        # A token merges across the border; a model that is asked later sees the prompt's tokens as they are alone.
        ids = prompt_ids + _without_end(_token_ids(completion, tokenizer, add_special_tokens=False), end)
    ids = [*ids, end]
    ignored = len(prompt_ids) if completion_only and prompt else 0
    return TokenizedExample(ids, [IGNORE_INDEX] * ignored + ids[ignored:])


def _without_end(ids: list[int], end: int) -> list[int]:
    return ids[:-1] if ids[-1:] == [end] else ids


def _encode_messages(
    messages: list[dict[str, Any]], tokenizer: Tokenizer, completion_only: bool, place: str
) -> TokenizedExample:
    """A conversation as the chat template writes it, closed with EOS if the template itself closes no turn.

    White space that a template writes after the token that ends a turn is not learned: generation has stopped there.
    A token that merges across the start of an answer counts to the answer.
    """
    text = _written(messages, tokenizer, False, place)
    ids = _token_ids(text, tokenizer, add_special_tokens=False)
    learned = [not completion_only] * len(ids)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"] if completion_only else []
    for turn in turns:
        before, through = _turn_borders(messages, turn, text, tokenizer, place)
        start = _common_start(ids, _token_ids(before, tokenizer, add_special_tokens=False))
        stop = _common_start(ids, _token_ids(through, tokenizer, add_special_tokens=False))
        while stop > start and str(tokenizer.decode([ids[stop - 1]])).isspace():
            stop -= 1
        learned[start:stop] = [True] * (stop - start)
    answer = messages[-1]["content"].strip() if messages[-1]["role"] == "assistant" else ""
    end = "" if tokenizer.eos_token_id is None else str(tokenizer.decode([tokenizer.eos_token_id]))
    is_closed = end != "" and text.rstrip().endswith(end)
    if answer and text.rstrip().endswith(answer) and not is_closed:
        ids, learned = [*ids, _end_token(tokenizer, place)], [*learned, True]
    return TokenizedExample(ids, [token if keep else IGNORE_INDEX for token, keep in zip(ids, learned, strict=True)])


def _turn_borders(
    messages: list[dict[str, Any]], turn: int, text: str, tokenizer: Tokenizer, place: str
) -> tuple[str, str]:
    """The beginnings of `text` up to where the answer messages[turn] starts, and up to where it ends.

    Raises CheckpointError when the template writes these messages differently with others behind them.
    """
    before = _written(messages[:turn], tokenizer, True, place)
    through = _written(messages[: turn + 1], tokenizer, False, place)
    if not (through.startswith(before) and text.startswith(through)):
        raise CheckpointError(
            f"{place}: the chat template writes a conversation up to messages[{turn}] differently when it goes on,"
            f" so the answer's tokens cannot be told apart; got {excerpt(through[-40:])} at its end;"
            " split the conversation into one record per answer, or pass completion_only=False"
        )
    return before, through


def _written(messages: list[dict[str, Any]], tokenizer: Tokenizer, for_generation: bool, place: str) -> str:
    """The conversation as text, by the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        raise CheckpointError(
            f"{place}: got messages, but this tokenizer has no chat template; use an instruct model's tokenizer,"
            " or records with prompt and completion"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_generation))
    # A template is a program of the checkpoint's, and may raise anything.
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages)
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{place}: the chat template refuses roles {roles} ({said}); change the record to what it accepts"
        ) from error


def _token_ids(text: str, tokenizer: Tokenizer, add_special_tokens: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def _end_token(tokenizer: Tokenizer, place: str) -> int:
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{place}: this tokenizer has no end-of-sequence token, so the model could not learn to stop;"
            " set tokenizer.eos_token"
        )
    return int(tokenizer.eos_token_id)


def _common_start(whole: list[int], beginning: list[int]) -> int:
    """How many tokens both begin with: less than all of `beginning` where a token merges across its end."""
    shared = 0
    while shared < min(len(whole), len(beginning)) and whole[shared] == beginning[shared]:
        shared += 1
    return shared
