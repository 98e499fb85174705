"""Records -> token batches.

    read_jsonl(path) -> records -> tokenize_all(records, tokenizer) -> examples -> batches(examples, ...) -> tensors

What is wrong in a record, or in the way a tokenizer's chat template writes it, raises CheckpointError;
a setting that cannot be, ConfigError. The tokenizer is any object with the methods of `Tokenizer`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qlora_lite.checkpoints.files import excerpt
from qlora_lite.checks import is_count, require
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.errors import CheckpointError
from qlora_lite.records import PROMPT_ALONE, Record, check_record, shape_of
from qlora_lite.records import read_jsonl as read_jsonl

OPEN_ROWS = 256
"""First-fit looks at the newest this many rows, so that packing n examples takes time proportional to n."""

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


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` examples in one epoch; a function of its arguments alone, so that a run can be resumed."""
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Indices of examples put first-fit, in the given order, into rows of at most `max_length` tokens.

    Every index occurs once. Only the newest OPEN_ROWS rows are tried. Raises ConfigError for a longer example.
    """
    longest = max(lengths, default=0)
    require(longest <= max_length, "max_length must hold the longest example", f"{max_length} for {longest} tokens")
    rows: list[list[int]] = []
    space: list[int] = []
    for index, length in enumerate(lengths):
        oldest = max(0, len(rows) - OPEN_ROWS)
        row = next((r for r in range(oldest, len(rows)) if space[r] >= length), len(rows))
        if row == len(rows):
            rows.append([])
            space.append(max_length)
        rows[row].append(index)
        space[row] -= length
    return rows


def batches(
    examples: Sequence[TokenizedExample],
    batch_size: int,
    seed: int,
    *,
    pad_token_id: int,
    epochs: int | None = None,
    packing: bool = False,
    max_length: int | None = None,
) -> Iterator[Batch]:
    """int64 tensors `input_ids`, `labels` of shape (rows <= batch_size, longest row), reshuffled in each epoch.

    Rows are filled at the end: labels IGNORE_INDEX there. With one example per row there is an `attention_mask`, 1 on
    tokens and 0 on filling. With `packing`, a row holds several examples, at most `max_length` tokens, and there are
    `position_ids` that begin anew with each, and no `attention_mask`: from these transformers builds a mask that
    lets no example see another, **if the model is called with `use_cache=False`**.
    epochs: None goes on without end. Raises ConfigError for settings that cannot be, before the first batch.
    """
    require(len(examples) > 0, "batches needs at least one example", len(examples))
    require(is_count(batch_size, 1), "batch_size must be an integer of at least 1", batch_size)
    require(is_count(seed, 0), "seed must be an integer of at least 0", seed)
    require(is_count(pad_token_id, 0), "pad_token_id must be a token id; eos serves as well as any", pad_token_id)
    require(epochs is None or is_count(epochs, 1), "epochs must be None or an integer of at least 1", epochs)
    if packing or max_length is not None:
        require(is_count(max_length, 2), "max_length must be at least 2, and packing needs it", max_length)
        longest = max(len(example.input_ids) for example in examples)
        wanted = "max_length must hold the longest example; tokenize with the same max_length"
        require(longest <= int(max_length or 0), wanted, f"{max_length} for {longest} tokens")
    return _batches(examples, batch_size, seed, pad_token_id, epochs, int(max_length or 0) if packing else None)


def _batches(
    examples: Sequence[TokenizedExample],
    batch_size: int,
    seed: int,
    pad_token_id: int,
    epochs: int | None,
    packed_length: int | None,
) -> Iterator[Batch]:
    epoch = 0
    while epochs is None or epoch < epochs:
        order = epoch_order(len(examples), seed, epoch)
        rows = [[index] for index in order]
        if packed_length is not None:
            lengths = [len(examples[index].input_ids) for index in order]
            rows = [[order[place] for place in row] for row in pack(lengths, packed_length)]
        for first in range(0, len(rows), batch_size):
            chosen = [[examples[index] for index in row] for row in rows[first : first + batch_size]]
            yield _collate(chosen, pad_token_id, with_positions=packed_length is not None)
        epoch += 1


def _collate(rows: list[list[TokenizedExample]], pad_token_id: int, with_positions: bool) -> Batch:
    lengths = [sum(len(example.input_ids) for example in row) for row in rows]
    filling = [max(lengths) - length for length in lengths]
    ids = [[token for example in row for token in example.input_ids] for row in rows]
    # The first token of an example has nothing before it; in a packed row the example in front must not predict it.
    labels = [[label for example in row for label in (IGNORE_INDEX, *example.labels[1:])] for row in rows]
    batch = {
        "input_ids": torch.tensor([row + [pad_token_id] * n for row, n in zip(ids, filling, strict=True)]),
        "labels": torch.tensor([row + [IGNORE_INDEX] * n for row, n in zip(labels, filling, strict=True)]),
    }
    if not with_positions:
        masks = [[1] * length + [0] * n for length, n in zip(lengths, filling, strict=True)]
        return batch | {"attention_mask": torch.tensor(masks)}
    # The filling counts from 0 too: as one more example it sees, and is seen by, none of the others.
    sizes = [[*(len(example.input_ids) for example in row), n] for row, n in zip(rows, filling, strict=True)]
    positions = [[position for size in row for position in range(size)] for row in sizes]
    return batch | {"position_ids": torch.tensor(positions)}
