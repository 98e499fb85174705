"""Answers: of one prompt, token by token, and of a batch. The tokens are those of transformers' `generate`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_lite.architecture import config_value
from qlora_lite.errors import ConfigError
from qlora_lite.generation.decode_step import short_steps
from qlora_lite.generation.joined_products import joined_products
from qlora_lite.generation.kept_cache import KeptCache
from qlora_lite.generation.prompts import Prompts
from qlora_lite.generation.settings import GenerationSettings, complete_config
from qlora_lite.patches import patched_attribute
from qlora_lite.positions import longest_sequence
from qlora_lite.sharding.base import check_whole
from qlora_lite.signals import check_signals
from qlora_lite.tasks import CAUSAL_LM, IMAGE_TEXT_TO_TEXT, Task, task_of

STOP, LENGTH, INTERRUPTED = "stop", "length", "interrupted"
SEED_BYTES = 7
INCOMPLETE = "\ufffd"
# Model types that ignore the attention mask, so that padding would enter their state as text.
READ_PADDING = ("rwkv",)


@dataclass(frozen=True)
class Answer:
    """What a model wrote. tokens: their number, with the one that ended it. finish_reason: `stop` (the model ended it),
    `length` (max_new_tokens) or `interrupted`."""

    text: str
    tokens: int
    finish_reason: str


class TextPieces:
    """The text of a row of tokens as they arrive, in pieces of whole characters. Joined they are the text of all.

    A token may be a part of a character: an emoji takes up to four of a byte-level tokenizer. The text of such a token
    alone ends with the replacement character, so it is held back until the next token completes it. A token's text also
    depends on the one before (SentencePiece drops the space in front of the first one), so the last pieces are decoded
    again with each token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # from here on tokens are decoded again
        self._given = 0  # up to here their text was given

    def add(self, token: int) -> str:
        """Returns the text that a further token completes; empty if it completes none."""
        self._tokens.append(token)
        text = self._new_text()
        return "" if text.endswith(INCOMPLETE) else self._give(text)

    def rest(self) -> str:
        """Returns the text that was held back, at the end of the tokens."""
        return self._give(self._new_text())

    def _new_text(self) -> str:
        before = decoded(self._tokenizer, self._tokens[self._start : self._given])
        return decoded(self._tokenizer, self._tokens[self._start :])[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._start, self._given = self._given, len(self._tokens)
        return text


def decoded(tokenizer: Any, tokens: list[int]) -> str:
    """Returns the text of tokens without special ones, and without the changes that tokenizers make to spaces."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Listener:
    """Gets what transformers' `generate` hands to a streamer: first the prompt, then one token at a time."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._has_prompt = False

    def put(self, tokens: Tensor) -> None:
        if self._has_prompt:
            for token in tokens.reshape(-1).tolist():
                self._on_token(token)
        self._has_prompt = True

    def end(self) -> None:
        """Is called after the last token."""


def writes_answers(task: Task, config: object) -> bool:
    """Whether a model of this task and config writes text behind a prompt: no classifier, and nothing that encodes it.

    task: also of a vision-language model, which answers text.
    """
    return task in (CAUSAL_LM, IMAGE_TEXT_TO_TEXT) and not config_value(config, "is_encoder_decoder")


def check_answers(model: Any) -> None:
    """Raises ConfigError for a model that writes no text behind a prompt: a classifier, an encoder, or one of both."""
    if not writes_answers(task_of(model), getattr(model, "config", None)):
        raise ConfigError(
            f"a {type(model).__name__} is made for {task_of(model).name}; only causal language models write answers "
            "here"
        )
    check_whole(model, "writing answers")


def reads_padding(model: Any) -> bool:
    """Whether a model reads padding as text, so that the prompts of a batch must have one length."""
    return config_value(model.config, "model_type") in READ_PADDING


def positions_left(model: Any, prompt: Sequence[int], settings: GenerationSettings) -> int | None:
    """Returns the positions that prompt and answer leave free, below 0 if they need more than the model was made for;
    None for a model whose config gives no number."""
    limit = longest_sequence(getattr(model, "config", None))
    return None if limit is None else limit - len(prompt) - settings.max_new_tokens


def answer_prompt(
    model: Any,
    prompts: Prompts,
    tokens: Sequence[int],
    settings: GenerationSettings,
    on_text: Callable[[str], None] | None = None,
    interrupted: Callable[[], bool] | None = None,
    number: int = 0,
    kept: KeptCache | None = None,
) -> Answer:
    """Returns the answer to a prompt.

    number: of this answer; drawn tokens depend on it and on `settings.seed`, and on nothing that was drawn before.
    on_text: gets the text as it is written, in pieces of whole characters. interrupted: is asked after each token
    whether to end the answer there. kept: keys and values of the conversation so far, which are reused and replaced.
    Raises Stopped for a signal that waits (signals.py).
    """
    check_answers(model)
    stop = prompts.stop_tokens(model)
    pieces, written, texts = TextPieces(prompts.tokenizer), list[int](), list[str]()

    def hand_on(text: str) -> None:
        if text:
            texts.append(text)
            if on_text is not None:
                on_text(text)

    def note(token: int) -> None:
        written.append(token)
        if token not in stop:
            hand_on(pieces.add(token))

    ends = [False]

    def ask(ids: Tensor, scores: object, **_: object) -> Tensor:
        check_signals()
        ends[0] = interrupted is not None and interrupted()
        return torch.full((len(ids),), ends[0], dtype=torch.bool, device=ids.device)

    _generate(model, prompts, [tokens], settings, stop, ask, _Listener(note), number, kept)
    hand_on(pieces.rest())
    reason = STOP if written[-1] in stop else INTERRUPTED if ends[0] else LENGTH
    return Answer("".join(texts), len(written), reason)


def answer_batch(
    model: Any, prompts: Prompts, rows: Sequence[Sequence[int]], settings: GenerationSettings, number: int = 0
) -> list[Answer]:
    """Returns the answers to several prompts, which are filled up on the left to one length.

    number: of this batch; drawn tokens depend on it and on `settings.seed`, and on nothing that was drawn before.
    Raises Stopped for a signal that waits.
    """
    check_answers(model)
    stop = set(prompts.stop_tokens(model))

    def ask(ids: Tensor, scores: object, **_: object) -> Tensor:
        check_signals()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    made = _generate(model, prompts, rows, settings, sorted(stop), ask, None, number)
    answers = []
    for row in made.tolist():
        end = next((place for place, token in enumerate(row) if token in stop), None)
        text = decoded(prompts.tokenizer, row[:end])
        answers.append(Answer(text, len(row) if end is None else end + 1, LENGTH if end is None else STOP))
    return answers


@torch.no_grad()
def _generate(
    model: Any,
    prompts: Prompts,
    rows: Sequence[Sequence[int]],
    settings: GenerationSettings,
    stop: Sequence[int],
    ask: Callable[..., Tensor],
    listener: _Listener | None,
    number: int = 0,
    kept: KeptCache | None = None,
) -> Tensor:
    """Returns the new tokens of each row, those behind the end of an answer filled up. kept: of one row."""
    pad, longest = prompts.padding(stop), max(map(len, rows))
    if min(map(len, rows)) < longest and reads_padding(model):
        raise ConfigError(
            f"a {type(model).__name__} reads padding as text; ask prompts of one length, or set batch_size 1"
        )
    filled = [[pad] * (longest - len(row)) + [*row] for row in rows]
    seen = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    config = complete_config(model, settings, stop, pad)
    config.return_dict_in_generate = True  # with the cache
    more: dict[str, Any] = {} if listener is None else {"streamer": listener}
    past = None if kept is None else kept.take(model, rows[0])
    if past is not None:
        more["past_key_values"] = past
    faster = short_steps(model), joined_products(model)  # of the adapter that answers now
    with patched_attribute(model, "generation_config", config), _seeded(settings, number), faster[0], faster[1]:
        made = model.generate(
            input_ids=torch.tensor(filled, device=model.device),
            attention_mask=torch.tensor(seen, device=model.device),
            generation_config=config,
            stopping_criteria=[ask],
            **more,
        )
    tokens: Tensor = made.sequences
    if kept is not None:
        kept.keep(model, getattr(made, "past_key_values", None), tokens[0].tolist())
    return tokens[:, longest:]


@contextmanager
def _seeded(settings: GenerationSettings, number: int) -> Iterator[None]:
    """Seeds torch within the block, and afterwards restores its random state. Without a seed it goes on as it is."""
    if settings.seed is None:
        yield
        return
    digest = hashlib.sha256(f"{settings.seed}:{number}".encode()).digest()
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(digest[:SEED_BYTES], "big"))
        yield
