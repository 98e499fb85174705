"""A conversation with a model: what was said so far, and the adapter that answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from qlora_lite.checks import require
from qlora_lite.data.chat.messages import ASSISTANT, check_text
from qlora_lite.errors import CheckpointError, ConfigError, TargetError
from qlora_lite.generation.answering import Answer, answer_prompt, check_answers, positions_left
from qlora_lite.generation.kept_cache import KeptCache
from qlora_lite.generation.prompts import Prompts
from qlora_lite.generation.settings import GenerationSettings, draws
from qlora_lite.lora.adapters import adapters_disabled
from qlora_lite.lora.multi_adapter import active_adapter, adapter_names, use_adapter_
from qlora_lite.positions import longest_sequence

Message = dict[str, object]
USER = "user"


@dataclass
class ChatSession:
    """A conversation with a model.

    system: what the system message says, None for none. dropped: the oldest turns (a question and its answer) that the
    last prompt left out since they took more positions than the model was made for; they are forgotten.

    Keys and values of the conversation are kept for its next turn (kept_cache.py).
    """

    model: Any
    tokenizer: Any
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    system: str | None = None
    dropped: int = field(default=0, init=False)
    messages: list[Message] = field(default_factory=list, init=False)
    adapter: str | None = field(init=False)

    def __post_init__(self) -> None:
        check_answers(self.model)
        if self.system is not None:
            check_text(self.system, "the system message", "chat")
        self._prompts = Prompts(self.tokenizer)
        self._answers, self._kept = 0, KeptCache()
        self.adapter = active_adapter(self.model)
        draws(self.model.generation_config, self.settings)
        limit, new = longest_sequence(self.model.config), self.settings.max_new_tokens
        require(
            limit is None or new < limit, f"max_new_tokens must leave room for a question in {limit} positions", new
        )
        self._check_template()

    def _check_template(self) -> None:
        """Raises CheckpointError for a tokenizer without a chat template, ConfigError if it takes no system message."""
        asked = [{"role": USER, "content": "question"}]
        self._prompts.of_conversation(asked)
        if self.system is not None:
            try:
                self._prompts.of_conversation([*self._opening(), *asked])
            except CheckpointError as error:
                raise ConfigError(f"the chat template takes no system message ({error}); leave it out") from error

    def _opening(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def reset(self) -> None:
        """Forgets what was said. The system message and the adapter stay."""
        self.messages.clear()
        self._kept.drop()

    def use(self, adapter: str | None) -> None:
        """Answers with an adapter from now on, None for the plain base. Raises TargetError for an unknown name."""
        names = adapter_names(self.model)
        if adapter is not None and adapter not in names:
            raise TargetError(f"there is no adapter {adapter!r}; there are: {', '.join(['off', *names])}")
        if adapter is not None:
            use_adapter_(self.model, adapter)
        if adapter != self.adapter:
            self._kept.drop()
        self.adapter = adapter

    def ask(
        self,
        text: str,
        on_text: Callable[[str], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> Answer:
        """Returns the answer to a message of the user, and keeps both; an answer that was interrupted, as far as it is.

        on_text, interrupted: as of `answer_prompt`. Raises CheckpointError, and keeps nothing, for a message that alone
        takes too many positions, or that the chat template cannot write.
        """
        check_text(text, "the message", "chat")
        tokens, kept = self._prompt([*self.messages, {"role": USER, "content": text}])
        self._answers += 1
        with answering_with(self.model, self.adapter):
            made = answer_prompt(
                self.model, self._prompts, tokens, self.settings, on_text, interrupted, self._answers, self._kept
            )
        self.messages = [*kept, {"role": ASSISTANT, "content": made.text}]
        return made

    def _prompt(self, messages: Sequence[Message]) -> tuple[list[int], list[Message]]:
        """The tokens of the prompt, and the messages in it: without the oldest turns that have no room."""
        self.dropped, left = 0, list(messages)
        while True:
            tokens = self._prompts.of_conversation([*self._opening(), *left])
            free = positions_left(self.model, tokens, self.settings)
            if free is None or free >= 0:
                return tokens, left
            if len(left) == 1:
                raise CheckpointError(
                    f"the message needs {len(tokens):,} tokens with the template, and {len(tokens) + free:,} are left "
                    f"beside an answer of {self.settings.max_new_tokens:,}; shorten it, or lower max_new_tokens"
                )
            left, self.dropped = left[2:], self.dropped + 1


@contextmanager
def answering_with(model: Any, adapter: str | None) -> Iterator[None]:
    """Makes the model compute with this adapter within the block, None for its plain base."""
    if adapter is None:
        with adapters_disabled(model):
            yield
    else:
        use_adapter_(model, adapter)
        yield
