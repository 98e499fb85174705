"""Tests of learned spans under random small templates, against renderings of every beginning of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.data.chat.answers import Conversation, LearnedText
from qlora_lite.data.chat.marks import END_OF_GENERATION, GENERATION
from qlora_lite.data.chat.messages import Message
from qlora_lite.data.chat.turns import ChatTemplateError, KnownShapes, Write, Writer
from qlora_lite.errors import CheckpointError

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
TURNS = ["<user>", "<assistant>", "<end>", "\n", "</s>", "<think>", "</think>", "a"]  # as a user may write them
QUESTIONS = WORDS | st.lists(st.sampled_from(TURNS), min_size=1, max_size=5).map("".join).filter(str.strip)
EXCHANGES = st.lists(st.tuples(QUESTIONS, WORDS, st.none() | WORDS), min_size=1, max_size=5)


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
        texts = Conversation(messages, Writer(template, special_at), known).learned(answers)
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
    kept = Conversation(messages, Writer(Template(), special_at), KnownShapes()).learned([1, 3, 5])
    assert [text.answers for text in kept] == [(1, 3, 5)]
    dropped = Conversation(messages, Writer(Template(keeps_thinking=False), special_at), KnownShapes()).learned(
        [1, 3, 5]
    )
    assert [text.answers for text in dropped] == [(1,), (3,), (5,)]


def test_what_a_template_leaves_out_is_named() -> None:
    messages = conversation([("a", "b", "c")])

    def without_thinking(part: Sequence[Message], for_generation: bool) -> str:
        return Template()(
            [{"role": message["role"], "content": message["content"]} for message in part], for_generation
        )

    with pytest.raises(ChatTemplateError, match=r"leaves out messages\[1\].reasoning_content$"):
        Conversation(messages, Writer(without_thinking, special_at), KnownShapes()).learned([1])

    def of_answers(part: Sequence[Message], for_generation: bool) -> str:
        return Template()([message for message in part if message["role"] == "assistant"], for_generation)

    with pytest.raises(ChatTemplateError, match=r"leaves out messages\[0\].content$"):
        Conversation(messages, Writer(of_answers, special_at), KnownShapes()).learned([1])


def test_renderings_grow_with_the_conversation_and_not_with_its_square() -> None:
    calls = []

    def counted(part: Sequence[Message], for_generation: bool) -> str:
        calls.append(len(part))
        return Template()(part, for_generation)

    for turns in (10, 80):
        calls.clear()
        messages = conversation([(f"question {n}", f"answer {n}", None) for n in range(turns)])
        (text,) = Conversation(messages, Writer(counted, special_at), KnownShapes()).learned(range(1, 2 * turns, 2))
        assert len(text.spans) == turns and len(calls) <= 14, calls


def under(template: Write, messages: Sequence[Message], marked: Write | None = None) -> Conversation:
    return Conversation(messages, Writer(template, special_at, marked), KnownShapes())


def parts(text: LearnedText) -> list[tuple[int, str]]:
    return [(index, text.text[start:stop]) for index, (start, stop) in zip(text.answers, text.spans, strict=True)]


def marking(pattern: str) -> Write:
    """`Template()`, with marks for `[` and `]` of a pattern of an answer: T is its reasoning, C its content."""

    def write(messages: Sequence[Message], for_generation: bool) -> str:
        text = ""
        for message in messages:
            if message["role"] != "assistant":
                text += Template()([message], False)
                continue
            thought = f"<think>{message['reasoning_content']}</think>" if message.get("reasoning_content") else ""
            values = {"T": thought, "C": str(message["content"]), "[": GENERATION, "]": END_OF_GENERATION}
            text += "<assistant>" + "".join(values.get(sign, sign) for sign in pattern.replace("E", "<end>\n"))
        return f"{text}<assistant>" if for_generation else text

    return write


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("[TCE]", ["<think>b</think>answer<end>"]),
        ("[TC]E", ["<think>b</think>answer<end>"]),  # the end is learned even if it was forgotten
        ("T[CE]", ["answer<end>"]),  # reasoning is left out
        ("T[C]E", ["answer<end>"]),
        ("[T][C]E", ["<think>b</think>answer<end>"]),
        ("[T]CE", ["<think>b</think>", "<end>"]),  # the content is left out, and the end is learned still
    ],
)
def test_what_the_template_says_is_generated_is_learned_and_the_end(pattern: str, expected: list[str]) -> None:
    messages = [*conversation([("a", "answer", "b")]), *conversation([("c", "d", None)])]
    conversation_ = under(Template(), messages, marking(pattern))
    if pattern != "[T]CE":
        (text,) = conversation_.learned([1, 3])
        assert parts(text) == [*((1, part) for part in expected), (3, "d<end>")]
    (text,) = conversation_.learned([1])
    assert parts(text) == [(1, part) for part in expected]


def test_an_answer_of_which_nothing_is_marked_is_named() -> None:
    messages = conversation([("a", "answer", "b"), ("c", "d", None)])
    with pytest.raises(
        ChatTemplateError, match=r"marks nothing of messages\[3\] by it; mark what is learned of it, or"
    ):
        under(Template(), messages, marking("[T]CE")).learned([1, 3])


@settings(max_examples=100, deadline=None)
@given(EXCHANGES, st.text(alphabet="[]", max_size=2), st.lists(st.sampled_from(["[", "]", ""]), min_size=4, max_size=4))
def test_marks_choose_among_the_characters_of_answers(
    exchanges: list[tuple[str, str, str | None]], first: str, signs: list[str]
) -> None:
    """What is learned is marked, or the template's own text at the end of a turn."""
    messages = conversation([(question.strip(), answer.strip(), thought) for question, answer, thought in exchanges])
    pattern = first + "".join(sign + part for sign, part in zip(signs, ["T", "C", "E", ""], strict=True))
    answers = range(1, len(messages), 2)
    (plain,) = under(Template(), messages).learned(answers)
    conversation_ = under(Template(), messages, marking(pattern))
    generated = conversation_._renderings.up_to(len(messages)).generated
    try:
        (text,) = conversation_.learned(answers)
    except ChatTemplateError:
        assert any(not any(a < stop and b > start for a, b in generated) for start, stop in plain.spans)
        return
    marked = {place for start, stop in generated for place in range(start, stop)}
    for index, (start, stop) in zip(plain.answers, plain.spans, strict=True):
        got = {place for n, span in zip(text.answers, text.spans, strict=True) if n == index for place in range(*span)}
        end = {*range(stop - len("<end>"), stop)}
        assert got == ({*range(start, stop)} & marked) | end


def test_a_whole_conversation_is_learned_from_its_first_character_to_its_last() -> None:
    messages = [*conversation([("a", "b", None), ("c", "d", None)]), {"role": "user", "content": "e"}]
    text = under(Template(), messages).whole()
    assert text.text == Template()(messages, False) and text.spans == ((0, len(text.text)),) and not text.is_open
    # Marks say what is generated, and all is to be learned.
    assert under(Template(), messages, marking("[T]CE")).whole() == text
    assert under(Template(), messages[:1]).whole().text == "<user>a<end>\n"
    assert under(refusing(Template(adds_empty=True)), GREETED).whole().text.startswith("<assistant>welcome<end>")
    for count, is_open in ((4, True), (5, False)):
        assert under(Template(closes=""), messages[:count]).whole().is_open is is_open
    rewritten = conversation([("a", "b", "c"), ("d", "e", None)])
    assert "<think>" not in under(Template(keeps_thinking=False), rewritten).whole().text

    def without_thinking(part: Sequence[Message], for_generation: bool) -> str:
        return Template()([{**message, "reasoning_content": ""} for message in part], for_generation)

    with pytest.raises(ChatTemplateError, match=r"leaves out messages\[1\].reasoning_content$"):
        under(without_thinking, rewritten).whole()


def test_answers_that_are_switched_off_are_left_out_of_a_whole_conversation() -> None:
    messages = [*conversation([("a", "b", None), ("c", "d", None)]), {"role": "user", "content": "e"}]
    text = under(Template(), messages).whole([1])
    assert [text.text[start:stop] for start, stop in text.spans] == [
        "<user>a<end>\n<assistant>",
        "\n<user>c<end>\n<assistant>d<end>\n<user>e<end>\n",
    ]
    assert not under(Template(closes=""), messages[:4]).whole([3]).is_open
    rewritten = conversation([("a", "b", "c"), ("d", "e", None)])
    with pytest.raises(ChatTemplateError, match=r"rewrites messages\[1\], so the rest cannot be learned without it"):
        under(Template(keeps_thinking=False), rewritten).whole([1, 3])


def test_prompts_end_with_the_opening_of_an_answer_and_hold_what_was_said() -> None:
    messages = conversation([("a", "b", "c"), ("d", "e", None)])[:3]
    prompt = "<user>a<end>\n<assistant>b<end>\n<user>d<end>\n<assistant>"
    assert under(Template(keeps_thinking=False), messages).prompt().text == prompt

    def of_users(part: Sequence[Message], for_generation: bool) -> str:
        return Template()([message for message in part if message["role"] == "user"], for_generation)

    with pytest.raises(ChatTemplateError, match=r"leaves out messages\[1\].content$"):
        under(of_users, messages).prompt()


def refusing(template: Write) -> Write:
    """The same, refusing what has no message of a user."""

    def write(messages: Sequence[Message], for_generation: bool) -> str:
        if all(message["role"] != "user" for message in messages):
            raise CheckpointError("the chat template refuses it")
        return template(messages, for_generation)

    return write


GREETED = [{"role": "assistant", "content": "welcome"}, *conversation([("a", "b", None)])]


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]])
def test_an_opening_answer_is_learned_if_it_stands_as_behind_a_question(system: list[Message]) -> None:
    messages, first = [*system, *GREETED], len(system)
    (text,) = under(refusing(Template()), messages).learned([first, first + 2])
    assert parts(text) == [(first, "welcome<end>"), (first + 2, "b<end>")]
    (text,) = under(refusing(Template(closes="")), messages).learned([first])
    assert parts(text) == [(first, "welcome<user>")]


def test_an_opening_answer_that_stands_otherwise_is_refused_and_can_be_switched_off() -> None:
    template = refusing(Template(adds_empty=True))  # an answer begins behind an empty block only if it is the last
    with pytest.raises(ChatTemplateError, match=r"cannot ask for messages\[0\].*give it weight 0, or put a user's"):
        under(template, GREETED).learned([0, 2])
    (text,) = under(template, GREETED).learned([2])
    assert parts(text) == [(2, "b<end>")]


def test_a_question_cannot_end_an_answer() -> None:
    """Without ends of turns, the token of the next turn ends an answer. It has to be the template's own."""

    def bare(messages: Sequence[Message], for_generation: bool) -> str:
        return "".join(str(message["content"]) for message in messages) + ("<assistant>" if for_generation else "")

    messages = conversation([("a", "b", None), ("<user>c", "d", None)])
    texts = under(bare, messages).learned([1, 3])
    assert [parts(text) for text in texts] == [[(1, "b")], [(3, "d")]]

    def closing(messages: Sequence[Message], for_generation: bool) -> str:
        return bare(messages, for_generation) + ("" if for_generation else "</s>")

    texts = under(closing, conversation([("a", "b", None), ("</s>c", "d", None)])).learned([1, 3])
    assert [parts(text) for text in texts] == [[(1, "b</s>")], [(3, "d</s>")]]
    assert [text.text for text in texts] == ["ab</s>", "ab</s>cd</s>"]
