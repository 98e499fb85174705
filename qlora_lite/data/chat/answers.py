"""Where a chat template writes each answer of a conversation: one rendering, and the characters that are learned.

An answer is learned from the end of its generation prompt to the end of its turn. Both are read from the template: the
rendering of the conversation up to the answer, with and without the answer. An answer *stands* in the rendering of a
longer conversation if that begins with the rendering that ends with the answer. Where it does not, since the template
rewrites history (Qwen3 drops earlier thinking, Phi-3 ends only the last turn), the answer needs a rendering of its own.
If the template says which part of an answer is generated, that part and the end of the turn are learned.

Renderings up to an answer are compared once for each shape of an answer and of the template's text around it, and
remembered. So the work grows linearly with the length of a conversation.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qlora_lite.data.chat.marks import Rendering
from qlora_lite.data.chat.messages import ASSISTANT, REASONING_KEYS, Message
from qlora_lite.data.chat.renderings import Renderings
from qlora_lite.data.chat.turns import (
    Borders,
    ChatTemplateError,
    KnownShapes,
    Span,
    Turn,
    Writer,
    common_length,
    common_tokens,
    generation_start,
)
from qlora_lite.errors import CheckpointError, listing

OPENED_TWICE = re.compile(r"<think>\s*(?:</think>\s*)?<think>\s*\Z")


@dataclass(frozen=True)
class LearnedText:
    """A rendering of a conversation, or of its beginning, and what is learned of it.

    spans: (start, stop) of the characters that are learned, from left to right. answers: for each span, the index of
    the message that it belongs to; empty if more than answers is learned. is_open: whether the template ends no turn,
    so that an end-of-sequence token has to follow the last answer.
    """

    text: str
    spans: tuple[Span, ...]
    answers: tuple[int, ...]
    is_open: bool


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Spans from left to right, without empty ones, and as one where they touch."""
    joined: list[Span] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return joined


class Conversation:
    """A conversation under a chat template.

    messages: in a form that the template can write. known: what earlier conversations showed of the template's answers;
    `setting` distinguishes what else the template was given (tools).
    """

    def __init__(
        self, messages: Sequence[Message], writer: Writer, known: KnownShapes, setting: Hashable = None
    ) -> None:
        self._messages, self._writer, self._known = messages, writer, known
        self._renderings = Renderings(messages, writer)
        self._of = self._renderings.of
        roles = [message["role"] for message in messages]
        self._setting = (setting, "system" in roles or "developer" in roles)
        self._first = roles.index(ASSISTANT) if ASSISTANT in roles else len(roles)

    def prompt(self) -> LearnedText:
        """The text behind which a model writes the next answer. Earlier answers may lose their reasoning in it.

        Raises ChatTemplateError, naming the fields, if the template leaves out other text.
        """
        rendering = self._renderings.up_to(len(self._messages), True)
        # Reasoning comes first where it stands in the content.
        last = {piece[:2]: number for number, piece in enumerate(self._renderings.pieces)}
        numbers = [number for (_, name), number in last.items() if name not in REASONING_KEYS]
        self._renderings.check_written(rendering, numbers)
        for index, message in enumerate(self._messages):
            if message["role"] == ASSISTANT and all(number in rendering.spans for number in self._of[index]):
                self._check_around(rendering, index)
        return LearnedText(rendering.text, (), (), False)

    def learned(self, answers: Iterable[int]) -> list[LearnedText]:
        """As few renderings as learn each of these messages as it is generated, shortest first.

        Raises ChatTemplateError, naming the fields, if the template leaves out text of an answer, and naming the
        answer if the template says what is generated and nothing of the answer is.
        """
        return [self._learned(rendering, standing) for rendering, standing in self._standing(answers)]

    def whole(self, left_out: Iterable[int] = ()) -> LearnedText:
        """The whole conversation, learned from its first character to its last, but for these answers.

        Earlier answers may lose their reasoning in it. Raises ChatTemplateError, naming the fields, if the template
        leaves out text of an answer also where it is the last one, or rewrites an answer that is not learned.
        """
        count, chosen = len(self._messages), sorted(left_out)
        whole = self._renderings.up_to(count)
        for index, message in enumerate(self._messages):
            if message["role"] == ASSISTANT:
                is_written = all(number in whole.spans for number in self._of[index])
                rendering = whole if is_written else self._renderings.up_to(index + 1)
                self._renderings.check_written(rendering, self._of[index])
                self._check_around(rendering, index)
        spans = {index: self._borders(whole, index, count) for index in chosen}
        if rewritten := [index for index, span in spans.items() if span is None]:
            names = listing(f"messages[{index}]" for index in rewritten)
            raise ChatTemplateError(f"the chat template rewrites {names}, so the rest cannot be learned without it")
        borders = [0, *(border for span in spans.values() for border in span or ()), len(whole.text)]
        last = count - 1
        is_open = self._messages[last]["role"] == ASSISTANT and last not in chosen and not self._turn().is_ended
        return LearnedText(whole.text, tuple(_joined(zip(borders[::2], borders[1::2], strict=True))), (), is_open)

    def _standing(self, answers: Iterable[int]) -> list[tuple[Rendering, dict[int, Span]]]:
        """As few renderings as hold each of these answers as it is generated, shortest first, and where."""
        found: list[tuple[Rendering, dict[int, Span]]] = []
        left = sorted(answers)
        count = len(self._messages)
        while left:
            rendering = self._renderings.up_to(count)
            borders = {index: self._borders(rendering, index, count) for index in left}
            if borders[left[-1]] is None:
                count = left[-1] + 1  # it stands in its own rendering only
                continue
            found.append((rendering, {index: span for index, span in borders.items() if span is not None}))
            left = [index for index in left if borders[index] is None]
            count = left[-1] + 1 if left else 0
        return found[::-1]

    def _learned(self, rendering: Rendering, standing: Mapping[int, Span]) -> LearnedText:
        if self._writer.write_marked is None:
            spans, indices = tuple(standing.values()), tuple(standing)
        else:
            parts = {index: self._generated(rendering, index, span) for index, span in standing.items()}
            spans = tuple(span for found in parts.values() for span in found)
            indices = tuple(index for index, found in parts.items() for _ in found)
        is_last = spans[-1][1] == len(rendering.text) or not rendering.text[spans[-1][1] :].strip()
        return LearnedText(rendering.text, spans, indices, is_last and not self._turn().is_ended)

    def _generated(self, rendering: Rendering, index: int, span: Span) -> list[Span]:
        """What the template says is generated of an answer, and the end of its turn if that is not."""
        start, stop = span
        found = [(max(start, a), min(stop, b)) for a, b in rendering.generated if a < stop and b > start]
        if not found:
            raise ChatTemplateError(
                f"the chat template has {{% generation %}} and marks nothing of messages[{index}] by it; "
                f"mark what is learned of it, or give the message weight 0"
            )
        last = max([found[-1][1], *(rendering.spans[n][1] for n in self._of[index] if n in rendering.spans)])
        return _joined([*found, (last, stop)])

    def _borders(self, rendering: Rendering, index: int, count: int) -> Span | None:
        """(start, stop) of an answer, or None if it does not stand in this rendering of `count` messages."""
        pieces = self._of[index]
        if not pieces or any(number not in rendering.spans for number in pieces):
            return self._compared(rendering, index, count)
        if pieces[0] > rendering.whole:  # the template left out a piece before: it rewrote history
            return self._compared(rendering, index, count)
        first, last = self._renderings.extent(rendering, index)
        shape = self._shape(rendering, index, first, last, index + 1 == count)
        if shape not in self._known.borders:
            span = self._compared(rendering, index, count)
            self._known.remember(shape, span and Borders(first - span[0], span[1] - last))
        borders = self._known.borders[shape]
        return None if borders is None else (first - borders.before, last + borders.behind)

    def _shape(self, rendering: Rendering, index: int, first: int, last: int, is_last: bool) -> tuple[Hashable, ...]:
        """What decides where an answer begins and ends: its fields, the role before it, and the template's own text
        around its pieces, up to the pieces of other messages."""
        order = rendering.order
        begin, end = bisect_left(order, (first, first)), bisect_left(order, (last, last))
        frames, place = [], order[begin - 1][1] if begin else 0
        for start, stop in order[begin:end]:
            frames.append(rendering.text[place:start])
            place = max(place, stop)
        behind = order[end][0] if end < len(order) else len(rendering.text)
        fields = tuple([self._renderings.pieces[number].field for number in self._of[index]])
        role = self._messages[index - 1]["role"] if index else None
        return (self._setting, fields, *frames, rendering.text[place:behind], role, is_last, index == self._first)

    def _compared(self, rendering: Rendering, index: int, count: int) -> Span | None:
        """The same, by comparing the renderings that end before and with the answer."""
        try:
            own = rendering if index + 1 == count else self._renderings.up_to(index + 1)
        except ChatTemplateError:
            raise
        except CheckpointError as error:
            return self._compared_behind_a_question(rendering, index, error)
        pieces = self._of[index]
        self._renderings.check_written(own, pieces)
        last = max((own.spans[number][1] for number in pieces), default=0)
        first = min((own.spans[number][0] for number in pieces), default=len(own.text.rstrip()))
        prompt = self._prompt(index, own, first)
        if early := [number for number in pieces if number in own.repeated and own.spans[number][0] < prompt]:
            names = dict.fromkeys(f"messages[{index}].{self._renderings.pieces[number].field}" for number in early)
            raise ChatTemplateError(f"the chat template writes {listing(names)} in the prompt too")
        start = generation_start(own.text, min(prompt, first), first, self._turn(), self._writer.learn_empty_reasoning)
        last = max(last, start)
        stop = last + len(own.text[last:].rstrip())
        self._check_answer(index, own.text, start, first, stop)
        if not rendering.text.startswith(own.text[:stop]):
            return None
        return (start, stop) if own is rendering else self._ended(rendering, start, last, stop)

    def _ended(self, rendering: Rendering, start: int, last: int, stop: int) -> Span | None:
        """The span of an answer that is followed by other messages; None if these begin before its turn ends."""
        following = 0
        if not self._turn().is_ended:  # the token that begins the next turn ends this one
            following = self._writer.special_at(rendering.text, stop)
            if not following:
                return None
        return (start, stop + following) if stop + following <= rendering.start_behind(last) else None

    def _turn(self) -> Turn:
        in_parts = any(isinstance(message.get("content"), list) for message in self._messages)
        return self._known.turn(self._writer, self._setting, in_parts)

    def _check_answer(self, index: int, text: str, start: int, first: int, stop: int) -> None:
        """Numbers bear no marks, and some templates write `None` for an answer that is a call alone."""
        lost = [piece for piece in self._renderings.numbers.get(index, ()) if piece.text not in text[start:stop]]
        if lost:
            names = listing(f"messages[{index}].{piece.field}" for piece in lost)
            raise ChatTemplateError(f"the chat template leaves out {names}")
        if OPENED_TWICE.search(text[:first]):
            raise ChatTemplateError(f"the chat template opens the thinking of messages[{index}] twice")
        if self._messages[index].get("content") is None and re.search(r"\bNone\b|\bnull\b", text[start:first]):
            raise ChatTemplateError(f"the chat template writes None for the missing content of messages[{index}]")

    def _check_around(self, rendering: Rendering, index: int) -> None:
        """The same for an answer whose start and end are not known: between the pieces of other messages."""
        if self._of[index]:
            first, last = self._renderings.extent(rendering, index)
            start, stop = rendering.end_before(first), rendering.start_behind(last)
            self._check_answer(index, rendering.text, start, first, stop)

    def _prompt(self, index: int, own: Rendering, first: int) -> int:
        """How many characters of the rendering that ends with an answer are its generation prompt."""
        try:
            text = self._writer.write(self._messages[:index], True)
        except CheckpointError as error:  # most templates refuse a conversation without messages
            opening = self._turn().opening
            if opening and (place := own.text.rfind(opening, own.end_before(first), first)) >= 0:
                return place + len(opening)
            asked = self._behind_a_question(index)
            if asked is None or not own.text.endswith(
                asked[0], 0, self._renderings.extent(own, index)[1] + asked[1].behind
            ):
                raise self._unknown(index) from error
            return first - asked[1].before
        if own.text.startswith(text):
            return len(text)
        # The template writes earlier messages differently before the answer and with it: what counts is the text behind
        # the last piece of the prompt.
        prompt = self._renderings.with_places(index, True)
        for number, (_, stop) in sorted(prompt.spans.items(), key=lambda item: -item[1][1]):
            if number in own.spans:
                place = own.spans[number][1]
                return place + common_length(prompt.text[stop:], own.text[place:])
        return common_length(text, own.text)

    def _behind_a_question(self, index: int) -> tuple[str, Borders] | None:
        """An answer behind a question, from the opening of its turn to its end, and its borders; None if the template
        refuses that too."""
        if not self._of[index] or (index and self._messages[index - 1]["role"] == "user"):
            return None
        in_parts = isinstance(self._messages[index].get("content"), list)
        question = [{"type": "text", "text": "question"}] if in_parts else "question"
        messages = [*self._messages[:index], {"role": "user", "content": question}, self._messages[index]]
        asked = Conversation(messages, self._writer, self._known, self._setting)
        try:
            ((rendering, spans),) = asked._standing([index + 1])
            before = self._writer.write(messages[:-1], False)
        except CheckpointError:
            return None
        (start, stop), (first, last) = spans[index + 1], asked._renderings.extent(rendering, index + 1)
        opening = common_tokens(before, rendering.text, self._writer.special_at)
        return rendering.text[opening:stop], Borders(first - start, stop - last)

    def _compared_behind_a_question(self, rendering: Rendering, index: int, refusal: CheckpointError) -> Span:
        """The span of an answer with which the template refuses to end: it has to stand as it does behind a question,
        together with the opening of its turn."""
        asked = self._behind_a_question(index)
        if asked and all(number in rendering.spans for number in self._of[index]):
            first, last = self._renderings.extent(rendering, index)
            stop = last + asked[1].behind
            if rendering.text.endswith(asked[0], 0, stop):
                span = self._ended(rendering, first - asked[1].before, last, stop)
                if span is not None:
                    return span
        raise self._unknown(index) from refusal

    @staticmethod
    def _unknown(index: int) -> ChatTemplateError:
        return ChatTemplateError(
            f"the chat template cannot ask for messages[{index}], so what a model would write there is unknown; "
            f"give it weight 0, or put a user's message before it"
        )
