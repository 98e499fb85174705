"""Records as token ids with labels: conversations by a chat template, other text as it stands.

A conversation is rendered once and tokenized once. The offsets of the tokens say which of them stand in what is
learned. A token that reaches over the start of an answer counts to the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qlora_lite.checkpoints.files import excerpt
from qlora_lite.checks import require
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.chat.answers import LearnedText
from qlora_lite.data.chat.messages import (
    ASSISTANT,
    Message,
    checked_messages,
    is_learned,
    without_nulls,
    without_switches,
)
from qlora_lite.data.chat.template import ChatTemplate
from qlora_lite.errors import CheckpointError


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any  # a string, or several by name
    eos_token_id: Any  # None, or the token id

    def __call__(self, text: str, *, add_special_tokens: bool, **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> object: ...
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


def special_tokens(tokenizer: object) -> list[str]:
    """The texts of the special tokens that a tokenizer knows, added ones included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [str(token) for token in added.values() if getattr(token, "special", False)]


class Encoder:
    """Turns checked records into examples, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, special_tokens(tokenizer))
        self._bos = str(getattr(tokenizer, "bos_token", None) or "")

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self._tokenizer.chat_template is not None

    def end_token(self, place: str) -> int:
        """The end-of-sequence token. Raises CheckpointError for a tokenizer without one."""
        if self._tokenizer.eos_token_id is None:
            raise CheckpointError(
                f"{place}: this tokenizer has no end-of-sequence token, so the model could not learn to stop;"
                " set tokenizer.eos_token"
            )
        return int(self._tokenizer.eos_token_id)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """Tokens of a text. A text that begins with the token that the tokenizer would put first gets no second one."""
        add = add_special_tokens and not (self._bos and text.startswith(self._bos))
        return list(self._tokenizer(text, add_special_tokens=add)["input_ids"])

    def prompt(self, prompt: str, place: str) -> TokenizedExample:
        """A prompt as a model gets it for generation; no token is learned."""
        if self.has_template:
            ids = self._ids(self._template.write([{"role": "user", "content": prompt}], True, {}), False)
        else:
            ids = _without_end(self._ids(prompt, True), self.end_token(place))
        if not ids:
            got = excerpt(prompt)
            raise CheckpointError(f"{place}: the prompt has no tokens; got {got}; write one that is not empty")
        return TokenizedExample(ids, [IGNORE_INDEX] * len(ids))

    def text(self, prompt: str, completion: str, completion_only: bool, place: str) -> TokenizedExample:
        """`prompt`, `completion` and one end-of-sequence token. With an empty prompt every token is learned."""
        end = self.end_token(place)
        # Some tokenizers append the end token themselves, and some texts have it.
        prompt_ids = _without_end(self._ids(prompt, True), end)
        ids = _without_end(self._ids(prompt + completion, True), end)
        if ids[: len(prompt_ids)] != prompt_ids:
            # A token merged across the border. For generation a model gets the tokens of the prompt alone.
            ids = prompt_ids + _without_end(self._ids(completion, False), end)
        ids = [*ids, end]
        ignored = len(prompt_ids) if completion_only and prompt else 0
        return TokenizedExample(ids, [IGNORE_INDEX] * ignored + ids[ignored:])

    def conversation(self, record: Mapping[str, object], completion_only: bool, place: str) -> list[TokenizedExample]:
        """The examples that learn a conversation: one, or more if the template rewrites earlier turns.

        Raises CheckpointError, beginning with `place`, for a conversation that the template cannot write whole.
        """
        if not self.has_template:
            raise CheckpointError(
                f"{place}: got messages, but this tokenizer has no chat template; use an instruct model's tokenizer,"
                " or records with prompt and completion"
            )
        checked = checked_messages(record["messages"], place)
        answers = [index for index, message in enumerate(checked) if message["role"] == ASSISTANT]
        chosen = [index for index in answers if is_learned(checked[index], place)]
        messages = [without_switches(message) for message in checked]
        given = _given(record, place)
        try:
            if not chosen:
                return [self._labelled(LearnedText(self._template.write(messages, False, given), (), (), False), place)]
            texts = self._template.learned(messages, chosen if completion_only else answers, given)
        except CheckpointError as error:
            raise CheckpointError(f"{place}: {error}") from error
        if completion_only:
            return [self._labelled(text, place) for text in texts]
        whole = texts[-1]
        return [self._labelled(LearnedText(whole.text, ((0, len(whole.text)),), whole.answers, whole.is_open), place)]

    def _labelled(self, written: LearnedText, place: str) -> TokenizedExample:
        ids, learned = self._learned_tokens(written)
        if written.is_open:
            ids, learned = [*ids, self.end_token(place)], [*learned, True]
        return TokenizedExample(
            ids, [token if keep else IGNORE_INDEX for token, keep in zip(ids, learned, strict=True)]
        )

    def _learned_tokens(self, written: LearnedText) -> tuple[list[int], list[bool]]:
        """The tokens of a text, and whether each stands in one of its spans."""
        if not getattr(self._tokenizer, "is_fast", False):
            return self._learned_tokens_by_prefix(written)
        encoded = self._tokenizer(written.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        learned = [False] * len(ids)
        spans = iter((*written.spans, (len(written.text) + 1, len(written.text) + 1)))
        start, stop = next(spans)
        for index, (first, last) in enumerate(offsets):
            while first >= stop:
                start, stop = next(spans)
            learned[index] = last > start and last > first
        return ids, learned

    def _learned_tokens_by_prefix(self, written: LearnedText) -> tuple[list[int], list[bool]]:
        """The same for a tokenizer that does not tell the places of its tokens."""
        ids = self._ids(written.text, False)
        learned = [False] * len(ids)
        for start, stop in written.spans:
            first, last = (_common_prefix(ids, self._ids(written.text[:place], False)) for place in (start, stop))
            learned[first:last] = [True] * (last - first)
        return ids, learned


def _given(record: Mapping[str, object], place: str) -> dict[str, object]:
    """What the template is given beside messages: tools (a list or JSON text), documents and its own variables."""
    given: dict[str, object] = {}
    for key in ("tools", "documents"):
        value = record.get(key)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except ValueError as error:
                raise CheckpointError(f"{place}: {key} must be a list or JSON text, got {excerpt(value)}") from error
        if not value:
            continue
        if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value):
            raise CheckpointError(f"{place}: {key} must be a list of objects, got {excerpt(value)}")
        given[key] = without_nulls(value)
    options = record.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise CheckpointError(f"{place}: chat_template_kwargs must be an object, got {excerpt(options)}")
    return {**options, **given}


def _without_end(ids: list[int], end: int) -> list[int]:
    return ids[:-1] if ids[-1:] == [end] else ids


def _common_prefix(ids: list[int], start: list[int]) -> int:
    """How many tokens both begin with. These are fewer than all of `start` if a token merges across its end."""
    shared = 0
    while shared < min(len(ids), len(start)) and ids[shared] == start[shared]:
        shared += 1
    return shared
