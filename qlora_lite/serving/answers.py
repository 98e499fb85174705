"""One answer at a time: a model is shared by all requests, which wait in a short queue, each for a limited time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from qlora_lite.checks import is_count, is_finite, require
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.generation.answering import INTERRUPTED, LENGTH, STOP, Answer, answer_prompt
from qlora_lite.generation.chat_session import answering_with
from qlora_lite.generation.kept_cache import KeptCache
from qlora_lite.generation.prompts import Prompts
from qlora_lite.generation.settings import GenerationSettings, draws
from qlora_lite.positions import longest_sequence
from qlora_lite.serving.stop_texts import StopTexts
from qlora_lite.serving.wanted import RequestError, Wanted


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    new_tokens: of an answer. queue: requests that wait while one is answered. seconds: of waiting, and again of
    answering. body_bytes: of a request.
    """

    new_tokens: int = 512
    queue: int = 8
    seconds: float = 300.0
    body_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        require(is_count(self.new_tokens, 1), "max_new_tokens must be at least 1", self.new_tokens)
        require(is_count(self.queue, 0), "queue must be at least 0", self.queue)
        require(is_finite(self.seconds) and self.seconds > 0, "time_limit must be above 0", self.seconds)
        require(is_count(self.body_bytes, 1), "body_bytes must be at least 1", self.body_bytes)


@dataclass(frozen=True)
class Written:
    """An answer, and the number of tokens before it."""

    answer: Answer
    prompt_tokens: int


class Cancel:
    """Says to an answer that nobody waits for it any more."""

    def __init__(self) -> None:
        self.is_said = False  # no lock, so that a handler of a signal may say it

    def __call__(self) -> None:
        self.is_said = True


class Answers:
    """Answers requests with one model. names: {what a request calls it: the adapter, None for the plain base}.

    Keys and values of the last conversation are kept for its next turn. They take what its answer needed, and go before
    another conversation is answered.
    """

    def __init__(self, model: Any, tokenizer: Any, names: dict[str, str | None], limits: Limits | None = None) -> None:
        self._model, self._prompts, self.names = model, Prompts(tokenizer), names
        self.limits, self.began = limits or Limits(), int(time.time())
        self._positions = longest_sequence(model.config)
        self._draws = draws(model.generation_config, GenerationSettings())
        self._thread = ThreadPoolExecutor(1, "answers")
        self._lock = threading.Lock()
        self._waiting = 0
        self._kept = KeptCache()  # of the last conversation
        self._closed = Cancel()

    def end(self) -> None:
        """Ends the answer that is written at its next token, and those that wait. Signal handlers may call it."""
        self._closed()

    def close(self) -> None:
        """As `end`, and waits for it."""
        self.end()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def submit(self, wanted: Wanted, on_text: Callable[[str], None], cancel: Cancel) -> Future[Written]:
        """Puts a request into the queue. on_text: gets the text in pieces, in the thread that writes it.

        Raises RequestError for an unknown model, a prompt that cannot be written or is too long, and a full queue.
        The result raises RequestError if it waited too long.
        """
        if wanted.model not in self.names:
            known = ", ".join(self.names)
            raise RequestError(
                f"there is no model {wanted.model!r:.80}; there are: {known}", "model", 404, "model_not_found"
            )
        tokens = self._tokens(wanted)
        settings = wanted.settings(self._room(wanted, len(tokens)), self._draws)
        with self._lock:
            if self._waiting > self.limits.queue:
                raise RequestError(f"{self._waiting} requests wait already; try again later", None, 503, "queue_full")
            self._waiting += 1
        until = time.monotonic() + self.limits.seconds
        future = self._thread.submit(self._answer, wanted, tokens, settings, on_text, cancel, until)
        future.add_done_callback(self._leave)
        return future

    def _leave(self, _: object) -> None:
        with self._lock:
            self._waiting -= 1

    def _tokens(self, wanted: Wanted) -> Sequence[int]:
        try:
            if wanted.messages is None:
                return self._prompts.of_text(wanted.text)
            return self._prompts.of_conversation(wanted.messages)
        except CheckpointError as error:
            raise RequestError(str(error), "prompt" if wanted.messages is None else "messages") from error

    def _room(self, wanted: Wanted, prompt: int) -> int:
        """The tokens that an answer may have."""
        most = self.limits.new_tokens
        if wanted.new_tokens is not None and wanted.new_tokens > most:
            raise RequestError(f"max_tokens must be at most {most:,} here; got {wanted.new_tokens:,}", "max_tokens")
        left = most if self._positions is None else self._positions - prompt
        if left < (wanted.new_tokens or 1):
            raise RequestError(
                f"the prompt has {prompt:,} tokens, and the model was made for {self._positions:,} positions; shorten "
                f"it, or lower max_tokens",
                "messages" if wanted.messages is not None else "prompt",
                code="context_length_exceeded",
            )
        return wanted.new_tokens or min(most, left)

    def _answer(
        self,
        wanted: Wanted,
        tokens: Sequence[int],
        settings: GenerationSettings,
        on_text: Callable[[str], None],
        cancel: Cancel,
        until: float,
    ) -> Written:
        if time.monotonic() > until:
            raise RequestError(f"waited for more than {self.limits.seconds:g} seconds", None, 503, "queue_timeout")
        stops, texts = StopTexts(wanted.stop), list[str]()
        ends = time.monotonic() + self.limits.seconds

        def hand_on(text: str) -> None:
            if text:
                texts.append(text)
                on_text(text)

        def interrupted() -> bool:
            return cancel.is_said or self._closed.is_said or stops.found or time.monotonic() > ends

        if interrupted():
            raise RequestError("nobody waits for this answer any more", None, 499)
        try:
            with answering_with(self._model, self.names[wanted.model]):
                made = answer_prompt(
                    self._model,
                    self._prompts,
                    tokens,
                    settings,
                    lambda piece: hand_on(stops.add(piece)),
                    interrupted,
                    kept=self._kept,
                )
        except ConfigError as error:
            raise RequestError(str(error)) from error
        hand_on(stops.rest())
        reason = STOP if stops.found else LENGTH if made.finish_reason == INTERRUPTED else made.finish_reason
        return Written(Answer("".join(texts), made.tokens, reason), len(tokens))
