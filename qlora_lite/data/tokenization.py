"""Tokenizes records, with labels on the tokens that are learned.

    read_records(path) -> records -> tokenize_all(records, tokenizer) -> examples -> batches(examples, ...) -> tensors

A wrong record, or a chat template that cannot be used for it, raises CheckpointError; a wrong setting raises
ConfigError. The tokenizer is any object with the methods of `Tokenizer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qlora_lite.checkpoints.files import excerpt
from qlora_lite.checks import is_count, require
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.records import PROMPT_ALONE, Message, Record, check_record, read_records, shape_of
from qlora_lite.errors import CheckpointError


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any  # a string, or several by name
    eos_token_id: Any  # None, or the token id

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...
    def apply_chat_template(
        self, conversation: Sequence[Message], *, tokenize: bool, add_generation_prompt: bool
    ) -> object: ...
    def decode(self, token_ids: list[int]) -> object: ...


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids and labels of one example.

    labels: the token id where a token is learned, IGNORE_INDEX elsewhere; not shifted.
    """

    input_ids: list[int]
    labels: list[int]

    def __post_init__(self) -> None:
        ids, labels = len(self.input_ids), len(self.labels)
        require(ids == labels > 0, "an example needs as many labels as input_ids, at least one", (ids, labels))

    @property
    def learned_tokens(self) -> int:
        """The number of tokens that the loss counts. The first token is not predicted, so it never counts."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True)
class TokenizedSet:
    """Examples, and the effect of `max_length` on them.

    truncated: the number of examples that were truncated.
    dropped: the number of records left out because no learned token was within `max_length`.
    """

    examples: list[TokenizedExample]
    truncated: int
    dropped: int

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
    record: Record, tokenizer: Tokenizer, completion_only: bool, place: str, prompts_too: bool
) -> TokenizedExample:
    shape = shape_of(record, place, prompts_too)
    if shape == PROMPT_ALONE:
        return _encode_prompt(record["prompt"], tokenizer, place)
    if shape == ("messages",):
        return _encode_messages(record["messages"], tokenizer, completion_only, place)
    if shape == ("text",):
        return _encode_plain("", record["text"], tokenizer, completion_only, place)
    has_template = tokenizer.chat_template is not None
    if shape == ("instruction", "output"):
        parts = (record["instruction"], record.get("input") or "")
        prompt = "\n\n".join(part for part in parts if part) + ("" if has_template else "\n\n")
        completion = record["output"]
    else:
        prompt, completion = record["prompt"], record["completion"]
    if not has_template:
        return _encode_plain(prompt, completion, tokenizer, completion_only, place)
    messages: list[Message] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _encode_messages(messages, tokenizer, completion_only, place)


def _encode_prompt(prompt: str, tokenizer: Tokenizer, place: str) -> TokenizedExample:
    """Returns a prompt as a model gets it for generation; no token is learned."""
    if tokenizer.chat_template is None:
        ids = _without_end(_token_ids(prompt, tokenizer, add_special_tokens=True), _end_token(tokenizer, place))
    else:
        text = _render([{"role": "user", "content": prompt}], tokenizer, True, place)
        ids = _token_ids(text, tokenizer, add_special_tokens=False)
    if not ids:
        raise CheckpointError(f"{place}: the prompt has no tokens; got {excerpt(prompt)}; write one that is not empty")
    return TokenizedExample(ids, [IGNORE_INDEX] * len(ids))


def _encode_plain(
    prompt: str, completion: str, tokenizer: Tokenizer, completion_only: bool, place: str
) -> TokenizedExample:
    """Returns `prompt`, `completion` and EOS. With an empty prompt every token is learned."""
    end = _end_token(tokenizer, place)
    # Some tokenizers append EOS themselves.
    prompt_ids = _without_end(_token_ids(prompt, tokenizer, add_special_tokens=True), end)
    ids = _without_end(_token_ids(prompt + completion, tokenizer, add_special_tokens=True), end)
    if ids[: len(prompt_ids)] != prompt_ids:
        # A token merged across the border. For generation a model gets the tokens of the prompt alone.
        ids = prompt_ids + _without_end(_token_ids(completion, tokenizer, add_special_tokens=False), end)
    ids = [*ids, end]
    ignored = len(prompt_ids) if completion_only and prompt else 0
    return TokenizedExample(ids, [IGNORE_INDEX] * ignored + ids[ignored:])


def _without_end(ids: list[int], end: int) -> list[int]:
    return ids[:-1] if ids[-1:] == [end] else ids


def _encode_messages(
    messages: list[Message], tokenizer: Tokenizer, completion_only: bool, place: str
) -> TokenizedExample:
    """Returns a conversation rendered by the chat template, closed with EOS if the template does not close turns.

    White space after the token that ends a turn is not learned, because generation has stopped there. A token that
    merges across the start of an answer counts to the answer.
    """
    text = _render(messages, tokenizer, False, place)
    ids = _token_ids(text, tokenizer, add_special_tokens=False)
    learned = [not completion_only] * len(ids)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"] if completion_only else []
    for turn in turns:
        before, through = _turn_borders(messages, turn, text, tokenizer, place)
        start = _common_prefix(ids, _token_ids(before, tokenizer, add_special_tokens=False))
        stop = _common_prefix(ids, _token_ids(through, tokenizer, add_special_tokens=False))
        while stop > start and str(tokenizer.decode([ids[stop - 1]])).isspace():
            stop -= 1
        learned[start:stop] = [True] * (stop - start)
    answer = messages[-1]["content"].strip() if messages[-1]["role"] == "assistant" else ""
    end = "" if tokenizer.eos_token_id is None else str(tokenizer.decode([tokenizer.eos_token_id]))
    is_closed = end != "" and text.rstrip().endswith(end)
    if answer and text.rstrip().endswith(answer) and not is_closed:
        ids, learned = [*ids, _end_token(tokenizer, place)], [*learned, True]
    return TokenizedExample(ids, [token if keep else IGNORE_INDEX for token, keep in zip(ids, learned, strict=True)])


def _turn_borders(messages: list[Message], turn: int, text: str, tokenizer: Tokenizer, place: str) -> tuple[str, str]:
    """Returns the prefixes of `text` up to the start and up to the end of the answer `messages[turn]`.

    Raises CheckpointError if the template renders these messages differently when others follow.
    """
    before = _render(messages[:turn], tokenizer, True, place)
    through = _render(messages[: turn + 1], tokenizer, False, place)
    if not (through.startswith(before) and text.startswith(through)):
        raise CheckpointError(
            f"{place}: the chat template renders a conversation up to messages[{turn}] differently when it continues,"
            f" so the answer's tokens cannot be told apart; got {excerpt(through[-40:])} at its end;"
            " split the conversation into one record per answer, or pass completion_only=False"
        )
    return before, through


def _render(messages: Sequence[Message], tokenizer: Tokenizer, for_generation: bool, place: str) -> str:
    """Returns the conversation as text, by the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        raise CheckpointError(
            f"{place}: got messages, but this tokenizer has no chat template; use an instruct model's tokenizer,"
            " or records with prompt and completion"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_generation))
    # A template is a program that comes with the checkpoint, and may raise anything.
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages)
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{place}: the chat template refuses roles {roles} ({reason}); change the record to one that it accepts"
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


def _common_prefix(ids: list[int], start: list[int]) -> int:
    """Returns how many tokens both begin with. These are fewer than all of `start` if a token merges across its end."""
    shared = 0
    while shared < min(len(ids), len(start)) and ids[shared] == start[shared]:
        shared += 1
    return shared
