"""Tests of learned spans under random small templates, against renderings of every beginning of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.data.chat.answers import ChatTemplateError, Conversation, KnownShapes
from qlora_lite.data.chat.messages import Message

ENDS = ["<end>", "<end>\n", ""]


@dataclass(frozen=True)
class Template:
    """A small template of one of the kinds that are in use.

    keeps_thinking: whether earlier answers keep their reasoning. closes: what ends a turn. closes_last: what ends the
    last turn besides. adds_empty: whether the last answer gets an empty block of reasoning if it has none. strips:
    whether contents are stripped.
    """

    keeps_thinking: bool = True
    closes: str = "<end>\n"
    closes_last: str = ""
    adds_empty: bool = False
    strips: bool = True

    def __call__(self, messages: Sequence[Message], for_generation: bool) -> str:
        text = ""
        for index, message in enumerate(messages):
            is_last = index + 1 == len(messages)
            content = str(message["content"])
            thought = str(message.get("reasoning_content") or "")
            text += f"<{message['role']}>"
            if thought and (self.keeps_thinking or is_last):
                text += f"<think>{thought}</think>"
            elif self.adds_empty and is_last and message["role"] == "assistant":
                text += "<think></think>"
            text += (content.strip() if self.strips else content) + self.closes
        if for_generation:
            return f"{text}<assistant>"
        return text + (self.closes_last if messages else "")


def special_at(text: str, position: int) -> int:
    return next((len(tag) for tag in ("<user>", "<system>", "<assistant>") if text.startswith(tag, position)), 0)


WORDS = st.text(alphabet="ab \n<é👋", min_size=1, max_size=8).filter(lambda text: text.strip() != "")
TEMPLATES = st.builds(
    Template, st.booleans(), st.sampled_from(ENDS), st.sampled_from(["", "</s>"]), st.booleans(), st.booleans()
)
EXCHANGES = st.lists(st.tuples(WORDS, WORDS, st.none() | WORDS), min_size=1, max_size=5)


def conversation(exchanges: list[tuple[str, str, str | None]]) -> list[dict[str, object]]:
    messages: list[dict[str, object]] = []
    for question, answer, thought in exchanges:
        messages.append({"role": "user", "content": question})
        thinks = {} if thought is None else {"reasoning_content": thought.strip()}
        messages.append({"role": "assistant", "content": answer, **thinks})
    return messages


def expected(template: Callable[[Sequence[Message], bool], str], messages: list[dict[str, object]], index: int) -> str:
    """What a model generates for an answer, from two renderings of the conversation up to it."""
    prompt = template(messages[:index], True)
    whole = template(messages[: index + 1], False)
    assert whole.startswith(prompt)
    generated = whole[len(prompt) :].rstrip()
    empty = "<think></think>"  # which only the template wrote, with the space behind it
    return generated.removeprefix(empty).lstrip() if generated.startswith(empty) else generated


@settings(max_examples=200, deadline=None)
@given(TEMPLATES, st.lists(EXCHANGES, min_size=1, max_size=3))
def test_every_answer_is_learned_once_as_it_is_generated(
    template: Template, conversations: list[list[tuple[str, str, str | None]]]
) -> None:
    known = KnownShapes()  # one for all, as in a file of records
    for exchanges in conversations:
        messages = conversation(exchanges)
        answers = range(1, len(messages), 2)
        texts = Conversation(messages, template, special_at, known).learned(answers)
        learned = {}
        for text in texts:
            assert len(text.spans) == len(text.answers)
            for index, (start, stop) in zip(text.answers, text.spans, strict=True):
                assert index not in learned
                learned[index] = (text, text.text[start:stop])
        assert sorted(learned) == list(answers)
        for index, (text, got) in learned.items():
            own = expected(template, messages, index)
            following = "" if own == got else got.removeprefix(own)
            assert got == own + following and following in ("", "<user>"), (got, own)
            assert text.text.startswith(template(messages[:index], True))
            ended = template.closes.strip() or (template.closes_last and index == text.answers[-1]) or following
            assert ended or text.is_open


def test_answers_share_a_text_where_the_template_keeps_history_and_are_split_where_it_does_not() -> None:
    messages = conversation([("a", "b", "c"), ("d", "e", "f"), ("g", "h", None)])
    kept = Conversation(messages, Template(), special_at, KnownShapes()).learned([1, 3, 5])
    assert [text.answers for text in kept] == [(1, 3, 5)]
    dropped = Conversation(messages, Template(keeps_thinking=False), special_at, KnownShapes()).learned([1, 3, 5])
    assert [text.answers for text in dropped] == [(1,), (3,), (5,)]


def test_what_a_template_leaves_out_is_named() -> None:
    messages = conversation([("a", "b", "c")])

    def without_thinking(part: Sequence[Message], for_generation: bool) -> str:
        return Template()(
            [{"role": message["role"], "content": message["content"]} for message in part], for_generation
        )

    with pytest.raises(ChatTemplateError, match=r"leaves out messages\[1\].reasoning_content$"):
        Conversation(messages, without_thinking, special_at, KnownShapes()).learned([1])

    def of_answers(part: Sequence[Message], for_generation: bool) -> str:
        return Template()([message for message in part if message["role"] == "assistant"], for_generation)

    with pytest.raises(ChatTemplateError, match=r"leaves out messages\[0\].content$"):
        Conversation(messages, of_answers, special_at, KnownShapes()).learned([1])


def test_renderings_grow_with_the_conversation_and_not_with_its_square() -> None:
    calls = []

    def counted(part: Sequence[Message], for_generation: bool) -> str:
        calls.append(len(part))
        return Template()(part, for_generation)

    for turns in (10, 80):
        calls.clear()
        messages = conversation([(f"question {n}", f"answer {n}", None) for n in range(turns)])
        (text,) = Conversation(messages, counted, special_at, KnownShapes()).learned(range(1, 2 * turns, 2))
        assert len(text.spans) == turns and len(calls) <= 14, calls
