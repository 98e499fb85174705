"""The records of tasks as token ids: each text whole, with the special tokens that the tokenizer adds, and an answer.

Beside the tokens of the texts, an example has a note in JSON: where each text ends, which tokens are of the second of
two texts, and the label. In the arrays of `token_arrays` the note follows the tokens, its bytes marked as learned.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lite.data.chat.messages import ASSISTANT, without_switches
from qlora_lite.data.chat.template import ChatTemplate
from qlora_lite.data.encoding import Draft, Marked, Tokenizer, special_tokens
from qlora_lite.data.shapes import Answered, Conversation, Part
from qlora_lite.errors import CheckpointError

NO_LABEL = -1  # of a token that does not begin a word


@dataclass(frozen=True)
class PartDraft:
    """A text before it is tokenized. special: let the tokenizer add its special tokens. words: where each begins.

    target: tokenize it as what a decoder writes.
    """

    text: str
    second: str | None = None
    special: bool = True
    ends: bool = False
    words: tuple[int, ...] = ()
    target: bool = False


@dataclass(frozen=True)
class TaskDraft(Draft):
    """The texts of a record before they are tokenized, and its answer. text: all of them, for errors."""

    parts: tuple[PartDraft, ...] = ()
    answer: object = None


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a text. second: the first one of the second of two texts, if their types tell it."""

    ids: list[int]
    second: int | None
    shortened: bool


class TaskEncoder:
    """Turns the contents of records into tokens, for one tokenizer. max_length: of each text, None for any."""

    def __init__(self, tokenizer: Tokenizer, max_length: int | None, date: datetime.date | None = None) -> None:
        self._tokenizer: Any = tokenizer
        self._max_length = max_length
        self._template = ChatTemplate(tokenizer, special_tokens(tokenizer), date, False)
        self._bos = str(getattr(tokenizer, "bos_token", None) or "")

    @property
    def date_written(self) -> datetime.date | None:
        """The date that the chat template writes; None if it writes none."""
        return self._template.date_written

    def cut_images(self, examples: Sequence[Marked], max_length: int | None) -> str | None:
        """None, because these records have no images."""
        return None

    def drafts(self, content: Answered) -> list[TaskDraft]:
        """The texts of a record, as one draft. Raises CheckpointError, without a place, for what cannot be written."""
        parts = tuple(self._drafted(part) for part in content.parts)
        text = " ".join(part.text + (part.second or "") for part in parts)
        return [TaskDraft(text, parts=parts, answer=content.answer)]

    def _drafted(self, part: Part) -> PartDraft:
        if part.conversation is not None:
            return self._conversation(part.conversation)
        if part.words:
            if not getattr(self._tokenizer, "is_fast", False):
                raise CheckpointError("this tokenizer does not tell the places of its tokens; use a fast one")
            text = " ".join(part.words)
            begins = [0]
            for word in part.words[:-1]:
                begins.append(begins[-1] + len(word) + 1)
            return PartDraft(text, words=tuple(begins))
        if part.ends and part.second is not None:  # a prompt and its answer
            if self._tokenizer.chat_template is None:
                return PartDraft(part.text + part.second, ends=True)
            messages = [{"role": "user", "content": part.text}, {"role": ASSISTANT, "content": part.second}]
            return self._conversation(Conversation(messages, {}))  # type: ignore[arg-type]
        return PartDraft(part.text, part.second, ends=part.ends, target=part.target)

    def _conversation(self, conversation: Conversation) -> PartDraft:
        if self._tokenizer.chat_template is None:
            raise CheckpointError(
                "got messages, but this tokenizer has no chat template; use an instruct model's tokenizer, or texts"
            )
        messages = [without_switches(message) for message in conversation.messages]
        return PartDraft(self._template.whole(messages, (), conversation.given).text, special=False)

    def tokens(self, drafts: Sequence[Draft]) -> list[Marked]:
        """Tokenizes drafts; an example without ids has a text without tokens."""
        chosen = [draft for draft in drafts if isinstance(draft, TaskDraft)]
        parts = [part for draft in chosen for part in draft.parts]
        made = iter(self._tokenized(parts))
        return [self._example(draft, [next(made) for _ in draft.parts]) for draft in chosen]

    def _tokenized(self, parts: Sequence[PartDraft]) -> list[_Tokens]:
        kinds: dict[tuple[bool, bool, bool, bool], list[int]] = {}
        for number, part in enumerate(parts):
            special = part.special and not (self._bos and part.text.startswith(self._bos))
            kinds.setdefault((special, part.second is not None, part.ends, part.target), []).append(number)
        found: dict[int, _Tokens] = {}
        for (special, is_pair, ends, _), numbers in kinds.items():
            rows = self._rows([parts[number] for number in numbers], special, is_pair, ends)
            found.update(zip(numbers, rows, strict=True))
        return [found[number] for number in range(len(parts))]

    def _rows(self, parts: Sequence[PartDraft], special: bool, is_pair: bool, ends: bool) -> list[_Tokens]:
        """Tokenizes texts of one kind. Those that are too long are tokenized again, cut as the tokenizer cuts them."""
        whole = self._called(parts, special, is_pair, None)
        end = self._tokenizer.eos_token_id if ends else None
        rows = [row if end is None or row.ids[-1:] == [end] else _Tokens([*row.ids, end], None, False) for row in whole]
        limit = self._max_length
        long = [number for number, row in enumerate(rows) if limit is not None and len(row.ids) > limit]
        if long:
            cut = self._called([parts[number] for number in long], special, is_pair, limit)
            for number, row in zip(long, cut, strict=True):
                rows[number] = _Tokens(row.ids, row.second, True)
        return rows

    def _called(self, parts: Sequence[PartDraft], special: bool, is_pair: bool, limit: int | None) -> list[_Tokens]:
        cut = {"truncation": False} if limit is None else {"truncation": "longest_first", "max_length": limit}
        texts = [part.text for part in parts]
        if parts[0].target:
            found = self._tokenizer(text_target=texts, add_special_tokens=special, verbose=False, **cut)
        else:
            seconds = [part.second for part in parts] if is_pair else None
            found = self._tokenizer(texts, seconds, add_special_tokens=special, verbose=False, **cut)
        if limit is not None and getattr(self._tokenizer, "is_fast", False):
            self._tokenizer.backend_tokenizer.no_truncation()  # the key of the cache compares tokenizers
        types = found.get("token_type_ids") if is_pair else None
        return [
            _Tokens(list(ids), None if types is None else _first_of_second(types[number]), False)
            for number, ids in enumerate(found["input_ids"])
        ]

    def _example(self, draft: TaskDraft, made: Sequence[_Tokens]) -> Marked:
        if any(not tokens.ids for tokens in made):
            return Marked([], [])
        ids = [token for tokens in made for token in tokens.ids]
        lengths = [len(tokens.ids) for tokens in made]
        note: dict[str, object] = {"texts": lengths}
        answer = draft.answer
        if draft.parts[0].words:
            answer = [answer, self._first_tokens(draft.parts[0], lengths[0])]
        if answer is not None:
            note["answer"] = answer
        if made[0].second is not None:
            note["second"] = made[0].second
        if any(tokens.shortened for tokens in made):
            note["shortened"] = 1
        stored = json.dumps(note, ensure_ascii=False, separators=(",", ":")).encode()
        return Marked([*ids, *stored], [(len(ids), len(ids) + len(stored))])

    def _first_tokens(self, part: PartDraft, count: int) -> list[int]:
        """For each of `count` tokens the number of the word that begins with it, else NO_LABEL."""
        cut = {} if self._max_length is None else {"truncation": "longest_first", "max_length": self._max_length}
        spans = self._tokenizer(part.text, return_offsets_mapping=True, verbose=False, **cut)["offset_mapping"][:count]
        if self._max_length is not None:
            self._tokenizer.backend_tokenizer.no_truncation()
        words, found = iter([*enumerate(part.words), (NO_LABEL, len(part.text) + 1)]), [NO_LABEL] * count
        word, begin = next(words)
        for number, (first, last) in enumerate(spans):
            if last > first and first <= begin < last:
                found[number] = word
            while last > begin:
                word, begin = next(words)
        return found


def _first_of_second(types: Sequence[int]) -> int:
    """Returns where the tokens of the second text begin. Raises CheckpointError for types other than 0 and then 1."""
    first = next((number for number, kind in enumerate(types) if kind), len(types))
    if list(types) != [0] * first + [1] * (len(types) - first):
        raise CheckpointError("this tokenizer mixes the types of the tokens of two texts; give one text")
    return first
