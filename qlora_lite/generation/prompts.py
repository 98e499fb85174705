"""What a model gets before it answers: the tokens of a conversation or a text, as in training."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qlora_lite.data.chat.messages import ASSISTANT, Message, without_switches
from qlora_lite.data.chat.template import ChatTemplate
from qlora_lite.data.encoding import Draft, Encoder, special_tokens
from qlora_lite.data.images.image import taken_out
from qlora_lite.data.shapes import Answered, Content, Conversation, Exchange, Tokens
from qlora_lite.errors import CheckpointError

NO_TEMPLATE = (
    "this tokenizer has no chat template; name an instruct model, put the chat_template.jinja that it was trained with "
    "into its folder, or give plain prompts to qlora-lite generate"
)
QUESTION, ANSWER = "question", "answer"


@dataclass(frozen=True)
class Prompt:
    """What a model answers. tokens: its input. shown: text, or messages. expected: the answer that a record has."""

    tokens: Sequence[int]
    shown: object
    expected: str | None = None


@dataclass
class Prompts:
    """Writes prompts for one tokenizer. date: what chat templates write that ask for it, today by default."""

    tokenizer: Any
    date: datetime.date | None = None
    _encoder: Encoder = field(init=False)
    _template: ChatTemplate = field(init=False)

    def __post_init__(self) -> None:
        self._encoder = Encoder(self.tokenizer, date=self.date)
        self._template = ChatTemplate(self.tokenizer, special_tokens(self.tokenizer), self.date)

    @property
    def date_written(self) -> datetime.date | None:
        """The date that prompts hold; None if the chat template writes none."""
        return self._template.date_written

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self._encoder.has_template

    def of_conversation(self, messages: Sequence[Message], given: Mapping[str, object] | None = None) -> list[int]:
        """Returns the tokens behind which a model writes the next answer. given: tools and the like.

        Raises CheckpointError for a tokenizer without a chat template, and for messages that it cannot write.
        """
        if not self.has_template:
            raise CheckpointError(NO_TEMPLATE)
        plain, images = taken_out([without_switches(message) for message in messages])
        if images:
            raise CheckpointError("has images, which are not read here; give text alone")
        return self._tokens(Draft(self._template.prompt(plain, given or {})))

    def of_text(self, text: str) -> list[int]:
        """Returns the tokens of a text that goes on, with the special tokens that the tokenizer puts first."""
        return self._tokens(Draft(text, special=True))

    def _tokens(self, draft: Draft) -> list[int]:
        found = self._encoder.tokens([draft])[0].ids
        if not found:
            raise CheckpointError("the prompt has no tokens; give one that is not empty")
        return found

    def of_record(self, content: Content | Answered) -> Prompt:
        """Returns the prompt of a record; an answer at its end is what is expected. Raises as `of_conversation`."""
        if isinstance(content, Conversation):
            return self._of_messages(content)
        if isinstance(content, Exchange):
            return self._of_exchange(content)
        what = "tokens" if isinstance(content, Tokens) else "labels"
        raise CheckpointError(f"has {what} and no text to answer; give messages, a prompt or a text")

    def _of_messages(self, content: Conversation) -> Prompt:
        messages, expected = content.messages, None
        if content.prompt:
            messages, answers = messages[: content.prompt], messages[content.prompt :]
            expected = _text_of(answers[:1])
        elif messages[-1]["role"] == ASSISTANT:
            messages, expected = messages[:-1], _text_of(messages[-1:])
        if not messages:
            raise CheckpointError("has an answer and nothing before it; give a message of the user")
        return Prompt(self.of_conversation(messages, content.given), [*messages], expected)

    def _of_exchange(self, content: Exchange) -> Prompt:
        if not content.prompt and content.completion is not None:  # a text that is learned whole
            return Prompt(self.of_text(content.completion), content.completion)
        if self.has_template:
            messages: list[dict[str, object]] = [{"role": "user", "content": content.prompt}]
            if content.system:
                messages.insert(0, {"role": "system", "content": content.system})
            return Prompt(self.of_conversation(messages, content.given), content.prompt, content.completion)
        if content.given:
            raise CheckpointError(f"got {', '.join(content.given)}, but this tokenizer has no chat template")
        before = f"{content.system}\n\n" if content.system else ""
        tokens = self.of_text(before + content.prompt + content.separator)
        return Prompt(tokens, content.prompt, content.completion)

    def stop_tokens(self, model: Any) -> list[int]:
        """Returns the tokens that end an answer: those of the model's generation config, the tokenizer's end token, and
        the special token with which the chat template closes an answer."""
        found = getattr(model.generation_config, "eos_token_id", None)
        ids = [] if found is None else [found] if isinstance(found, int) else list(found)
        own = [self.tokenizer.eos_token_id, self._closing]
        return list(dict.fromkeys([*ids, *(token for token in own if token is not None)]))

    @cached_property
    def _closing(self) -> int | None:
        """The special token behind an answer in a conversation; None if there is none."""
        if not self.has_template:
            return None
        messages = [{"role": "user", "content": QUESTION}, {"role": ASSISTANT, "content": ANSWER}]
        try:
            text = self._template.write(messages, False, {})
        except CheckpointError:  # it takes another form; the other tokens have to do
            return None
        behind = text.rpartition(ANSWER)[2].lstrip()
        length = self._template.special_at(behind, 0)
        return int(self.tokenizer.convert_tokens_to_ids(behind[:length])) if length else None

    def padding(self, stop: Iterable[int]) -> int:
        """Returns a token to fill rows with. The model does not see it."""
        pad = self.tokenizer.pad_token_id
        return int(next(iter(stop), 0) if pad is None else pad)


def _text_of(messages: Sequence[Mapping[str, object]]) -> str | None:
    content = messages[0].get("content")
    return content if isinstance(content, str) else None
