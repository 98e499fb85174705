"""Records as token ids with labels: conversations by a chat template, other text as it stands.

A record becomes drafts: texts, and the characters of each that are learned. Drafts are tokenized in batches, and the
offsets of the tokens say which of them stand in what is learned. A token that reaches over the start of an answer
counts to the answer.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from qlora_lite.checks import require
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.chat.answers import LearnedText
from qlora_lite.data.chat.messages import ASSISTANT, LEARN, learned_messages, without_switches
from qlora_lite.data.chat.template import ChatTemplate, TemplatedTokenizer
from qlora_lite.data.chat.token_spans import Span, TokenBytes, ranges_by_bytes, ranges_by_positions
from qlora_lite.data.images.image import Image, KeptImage, taken_out
from qlora_lite.data.images.processor import ImageProcessor
from qlora_lite.data.shapes import Content, Conversation, Exchange, Tokens
from qlora_lite.errors import CheckpointError


class Tokenizer(TemplatedTokenizer, Protocol):
    """The part of a transformers tokenizer that is used here."""

    eos_token_id: Any  # None, or the token id
    backend_tokenizer: Any  # of a fast tokenizer: that of the package tokenizers

    def __len__(self) -> int: ...
    def __call__(self, text: Any, *, add_special_tokens: bool, **options: Any) -> Any: ...
    def decode(self, token_ids: list[int], **options: Any) -> object: ...


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids and labels of one example.

    labels: the token id where a token is learned, IGNORE_INDEX elsewhere; not shifted. images: in the order of their
    tokens.
    """

    input_ids: list[int]
    labels: list[int]
    images: tuple[KeptImage, ...] = ()

    def __post_init__(self) -> None:
        ids, labels = len(self.input_ids), len(self.labels)
        require(ids == labels > 0, "an example needs as many labels as input_ids, at least one", (ids, labels))

    @property
    def learned_tokens(self) -> int:
        """The number of tokens that the loss counts. The first token is not predicted, so it never counts."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True)
class Draft:
    """A text before it is tokenized.

    spans: (start, stop) of the characters that are learned. prompt: the beginning of the text that a model gets for
    generation; its tokens stay as they are alone. special: let the tokenizer add its special tokens. end: append the
    end-of-sequence token, learned. images: whose tokens stand in the text.
    """

    text: str
    spans: Sequence[tuple[int, int]] = ()
    prompt: str = ""
    special: bool = False
    end: bool = False
    images: tuple[KeptImage, ...] = ()


@dataclass(frozen=True)
class Marked:
    """Token ids, the ranges (start, stop) of those that are learned, in order, and the images that belong to them."""

    ids: list[int]
    learned: list[tuple[int, int]]
    images: tuple[KeptImage, ...] = ()

    def example(self) -> TokenizedExample:
        """The same with labels."""
        labels = [IGNORE_INDEX] * len(self.ids)
        for start, stop in self.learned:
            labels[start:stop] = self.ids[start:stop]
        return TokenizedExample(self.ids, labels, self.images)


def special_tokens(tokenizer: object) -> list[str]:
    """The texts of the special tokens that a tokenizer knows, added ones included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [str(token) for token in added.values() if getattr(token, "special", False)]


class Encoder:
    """Turns the contents of records into tokens, for one tokenizer.

    learn: `answers`, the `last-answer` of each conversation, or `all` tokens. images: reads the images of records; None
    refuses records with images.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        learn: str = "answers",
        learn_empty_reasoning: bool = False,
        date: datetime.date | None = None,
        images: ImageProcessor | None = None,
    ) -> None:
        require(learn in LEARN, f"learn must be one of {', '.join(LEARN)}", learn)
        self._tokenizer, self._learn, self._images = tokenizer, learn, images
        self._template = ChatTemplate(tokenizer, special_tokens(tokenizer), date, learn_empty_reasoning)
        self._bos = str(getattr(tokenizer, "bos_token", None) or "")
        self._spells = True  # until tokens are seen that do not spell their texts

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self._tokenizer.backend_tokenizer)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self._tokenizer.chat_template is not None

    @property
    def date_written(self) -> datetime.date | None:
        """The date that the chat template writes; None if it writes none."""
        return self._template.date_written

    def end_token(self) -> int:
        """The end-of-sequence token. Raises CheckpointError for a tokenizer without one."""
        if self._tokenizer.eos_token_id is None:
            raise CheckpointError(
                "this tokenizer has no end-of-sequence token, so the model could not learn to stop; "
                "set tokenizer.eos_token"
            )
        return int(self._tokenizer.eos_token_id)

    def drafts(self, content: Content) -> list[Draft] | Marked:
        """The texts that learn a record: one, or more if the template rewrites earlier turns. Tokens stay tokens.

        Raises CheckpointError, without a place, for what cannot be written or learned.
        """
        if isinstance(content, Tokens):
            return self._checked(content)
        if isinstance(content, Conversation):
            return self._conversation(content)
        if self.has_template and (content.prompt or content.completion is None):
            return self._conversation(_as_conversation(content))
        if content.given:
            raise CheckpointError(f"got {', '.join(content.given)}, but this tokenizer has no chat template")
        return [self._plain(content)]

    def _checked(self, tokens: Tokens) -> Marked:
        largest = max(tokens.input_ids)
        if largest >= len(self._tokenizer):
            raise CheckpointError(
                f"input_ids must be below {len(self._tokenizer)}, the tokenizer's size; got {largest}"
            )
        learned = [True] * len(tokens.learned) if self._learn == "all" else tokens.learned
        return Marked(tokens.input_ids, _ranges(learned))

    def _plain(self, exchange: Exchange) -> Draft:
        system = f"{exchange.system}\n\n" if exchange.system else ""
        prompt = system + exchange.prompt
        if exchange.completion is None:
            return Draft(prompt, special=True)
        self.end_token()
        prompt += exchange.separator
        text = prompt + exchange.completion
        start = 0 if self._learn == "all" else len(prompt)
        return Draft(text, ((start, len(text)),), prompt, special=True, end=True)

    def _conversation(self, content: Conversation) -> list[Draft]:
        if not self.has_template:
            raise CheckpointError(
                "got messages, but this tokenizer has no chat template; use an instruct model's tokenizer, "
                "or records with prompt and completion"
            )
        chosen = learned_messages(content.messages, self._learn, "messages")
        if self._learn != "all":
            chosen = [index for index in chosen if index >= content.prompt]
        messages, images = taken_out([without_switches(message) for message in content.messages])
        given = content.given
        if images:
            if self._images is None:
                raise CheckpointError("has images, which are not read here; give text alone")
            self._images.check_known()
        if self._learn == "all":
            left_out = [index for index in range(len(messages)) if index not in chosen]
            texts = [self._template.whole(messages, left_out, given)]
        elif chosen:
            texts = self._template.learned(messages, chosen, given)
        elif messages[-1]["role"] == ASSISTANT:
            return [self._draft(replace(self._template.whole(messages, (), given), spans=(), is_open=False), images)]
        else:
            return [self._draft(LearnedText(self._template.prompt(messages, given), (), (), False), images)]
        if any(text.is_open for text in texts):
            self.end_token()
        return [self._draft(text, images) for text in texts]

    def _draft(self, text: LearnedText, images: Sequence[tuple[int, Image]]) -> Draft:
        """The draft of a rendering. images: of the conversation, with the indices of their messages."""
        if not images or self._images is None:
            return Draft(text.text, text.spans, end=text.is_open)
        last = max(text.answers, default=len(images))
        whole, spans, kept = self._images.in_text(text.text, text.spans, images, last)
        return Draft(whole, spans, end=text.is_open, images=kept)

    def cut_images(self, examples: Sequence[Marked], max_length: int | None) -> str | None:
        """Why `max_length` must not cut one of these examples (`ImageProcessor.cut`); None if it does not."""
        found = (self._images.cut(one.ids, max_length) for one in examples if one.images and self._images is not None)
        return next(filter(None, found), None)

    def tokens(self, drafts: Sequence[Draft]) -> list[Marked]:
        """Tokenizes drafts, all in one call of the tokenizer where it can. A text may have no tokens."""
        is_fast = getattr(self._tokenizer, "is_fast", False)
        made = self._by_backend(drafts) if is_fast else [self._by_prefix(draft) for draft in drafts]
        return [replace(one, images=draft.images) for one, draft in zip(made, drafts, strict=True)]

    def _by_backend(self, drafts: Sequence[Draft]) -> list[Marked]:
        ids: list[list[int]] = [[]] * len(drafts)
        ranges: dict[int, list[Span]] = {}
        with_positions = not self._spells
        for special in (False, True):
            numbers = [number for number, draft in enumerate(drafts) if self._adds(draft) == special]
            texts = [drafts[number].text for number in numbers]
            for number, encoding in zip(numbers, self._encodings(texts, special, with_positions), strict=True):
                draft, ids[number] = drafts[number], encoding.ids
                if with_positions and _has_ranges(draft):
                    ranges[number] = ranges_by_positions(encoding, draft.text, draft.spans)
        if not with_positions:
            ranges = self._spelled_ranges(drafts, ids)
        return [
            self._after_prompt(draft, own) if draft.prompt else self._closed(draft, own, ranges.get(number, []))
            for number, (draft, own) in enumerate(zip(drafts, ids, strict=True))
        ]

    def _spelled_ranges(self, drafts: Sequence[Draft], ids: Sequence[list[int]]) -> dict[int, list[Span]]:
        """The ranges of drafts, by number, from the bytes of their tokens. Those that these do not tell are tokenized
        again, with positions. If they are most, later drafts are tokenized with positions from the start."""
        ranges: dict[int, list[Span]] = {}
        left: list[int] = []
        for number, draft in enumerate(drafts):
            if _has_ranges(draft):
                found = ranges_by_bytes(ids[number], draft.text, draft.spans, self._token_bytes)
                if found is None:
                    left.append(number)
                else:
                    ranges[number] = found
        if len(left) > len(ranges):
            self._spells = False
        for number, encoding in zip(left, self._encodings([drafts[number].text for number in left]), strict=True):
            ranges[number] = ranges_by_positions(encoding, drafts[number].text, drafts[number].spans)
        return ranges

    def _encodings(self, texts: list[str], special: bool = False, with_positions: bool = True) -> Sequence[Any]:
        """The encodings of the Rust tokenizer. A call of the tokenizer of transformers costs half as much again."""
        if not texts:
            return ()
        backend = self._tokenizer.backend_tokenizer
        if backend.truncation is not None or backend.padding is not None:
            self._tokenizer("", add_special_tokens=False)  # transformers turns off what the tokenizer's file asks for
        encode = backend.encode_batch if with_positions else backend.encode_batch_fast
        return list(encode(texts, add_special_tokens=special))

    def _adds(self, draft: Draft) -> bool:
        """Whether the tokenizer adds special tokens; none is added before a text that begins with it."""
        return draft.special and not (self._bos and draft.text.startswith(self._bos))

    def _ids(self, text: str, special: bool) -> list[int]:
        add = special and not (self._bos and text.startswith(self._bos))
        return list(self._tokenizer(text, add_special_tokens=add)["input_ids"])

    def _after_prompt(self, draft: Draft, ids: list[int]) -> Marked:
        """Prompt and completion: the tokens of the prompt are those that a model gets for generation."""
        end = self.end_token()
        prompt = _without_end(self._ids(draft.prompt, draft.special), end)
        ids = _without_end(ids, end)
        if ids[: len(prompt)] != prompt:  # a token merged across the border
            ids = prompt + _without_end(self._ids(draft.text[len(draft.prompt) :], False), end)
        start = 0 if draft.spans[0][0] == 0 else len(prompt)
        return Marked([*ids, end], [(start, len(ids) + 1)])

    def _closed(self, draft: Draft, ids: list[int], learned: list[tuple[int, int]]) -> Marked:
        if draft.special and self._tokenizer.eos_token_id is not None:
            # Some tokenizers append the end token themselves, and some texts have it.
            ids = _without_end(ids, self.end_token())
        if draft.special and draft.spans:
            learned = [(0, len(ids))]  # of a text every token is learned, those that the tokenizer put first too
        if draft.end:
            ids, learned = [*ids, self.end_token()], [*learned, (len(ids), len(ids) + 1)]
        return Marked(ids, learned)

    def _by_prefix(self, draft: Draft) -> Marked:
        """The same for a tokenizer that does not tell the places of its tokens."""
        ids = self._ids(draft.text, draft.special)
        if draft.prompt:
            return self._after_prompt(draft, ids)
        learned = []
        for start, stop in draft.spans if not draft.special else ():
            first, last = (_common_prefix(ids, self._ids(draft.text[:place], False)) for place in (start, stop))
            learned.append((first, last))
        return self._closed(draft, ids, learned)


def _has_ranges(draft: Draft) -> bool:
    """Whether the positions of tokens matter; of a text that gets special tokens, all or the end is learned."""
    return bool(draft.spans) and not draft.special


def _as_conversation(exchange: Exchange) -> Conversation:
    messages: list[dict[str, object]] = [{"role": "user", "content": exchange.prompt}]
    if exchange.system:
        messages.insert(0, {"role": "system", "content": exchange.system})
    if exchange.completion is not None:
        messages.append({"role": ASSISTANT, "content": exchange.completion})
    return Conversation(messages, exchange.given)


def _ranges(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """The ranges of positions whose flag is set."""
    ranges, start = [], 0
    for flag, group in itertools.groupby(flags):
        stop = start + sum(1 for _ in group)
        if flag:
            ranges.append((start, stop))
        start = stop
    return ranges


def _without_end(ids: list[int], end: int) -> list[int]:
    return ids[:-1] if ids[-1:] == [end] else ids


def _common_prefix(ids: list[int], start: list[int]) -> int:
    """How many tokens both begin with. These are fewer than all of `start` if a token merges across its end."""
    shared = 0
    while shared < min(len(ids), len(start)) and ids[shared] == start[shared]:
        shared += 1
    return shared
