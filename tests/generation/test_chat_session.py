"""Tests of ChatSession: what the model sees of a conversation, and which adapter answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from qlora_lite import LoraConfig, add_lora_
from qlora_lite.errors import CheckpointError, ConfigError, TargetError
from qlora_lite.generation import chat_session
from qlora_lite.generation.answering import Answer
from qlora_lite.generation.chat_session import ChatSession
from qlora_lite.generation.settings import GenerationSettings
from qlora_lite.lora import add_adapter_, lora_layers

FOUR = GenerationSettings(max_new_tokens=4)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> list[str]:
    """The prompts that a model gets, which answers `yes` each time."""
    texts: list[str] = []

    def answer(model: Any, prompts: Any, tokens: list[int], *_: object, **__: object) -> Answer:
        texts.append("".join(tokenizer.convert_ids_to_tokens(tokens)))
        return Answer("yes", 3, "stop")

    monkeypatch.setattr(chat_session, "answer_prompt", answer)
    return texts


def test_a_prompt_holds_what_was_said(model: Any, tokenizer: Any, seen: list[str]) -> None:
    session = ChatSession(model, tokenizer, FOUR, system="be")
    for text in ("one", "two"):
        assert session.ask(text).text == "yes"
    session.reset()
    session.ask("three")
    assert seen == [
        "<system>be</s><user>one</s><assistant>",
        "<system>be</s><user>one</s><assistant>yes</s><user>two</s><assistant>",
        "<system>be</s><user>three</s><assistant>",
    ]


def test_the_oldest_turns_are_forgotten_where_positions_run_out(model: Any, tokenizer: Any, seen: list[str]) -> None:
    model.config.max_position_embeddings = 35
    session = ChatSession(model, tokenizer, FOUR, system="be")
    dropped = []
    for text in ("one", "two", "three", "four"):
        session.ask(text)
        dropped.append(session.dropped)
    assert dropped == [0, 0, 1, 1]
    assert seen[-1] == "<system>be</s><user>three</s><assistant>yes</s><user>four</s><assistant>"
    with pytest.raises(
        CheckpointError, match="the message needs 47 tokens with the template, and 31 are left beside an"
    ):
        session.ask("x" * 40)
    assert [message["content"] for message in session.messages] == ["three", "yes", "four", "yes"]


def test_each_adapter_answers_by_itself(model: Any, tokenizer: Any) -> None:
    plain = ChatSession(model, tokenizer, FOUR).ask("a")
    assert ChatSession(model, tokenizer, FOUR).adapter is None
    add_lora_(model, LoraConfig(rank=2, alpha=64, target_modules=["down_proj"]), "one")
    add_adapter_(model, "two", LoraConfig(rank=2, alpha=64, target_modules=["up_proj"]))
    session = ChatSession(model, tokenizer, FOUR)
    answers = {}
    for name in ("two", "one", None, "two"):
        session.use(name)
        for layer in lora_layers(model).values() if name not in answers and name is not None else ():
            layer.lora_B.data.normal_(std=2.0)
        session.reset()
        text = session.ask("a").text
        assert answers.setdefault(name, text) == text
    assert answers[None] == plain.text and len(set(answers.values())) == 3
    assert all(layer.adapter_enabled for layer in lora_layers(model).values())
    with pytest.raises(TargetError, match="there is no adapter 'three'; there are: off, one, two"):
        session.use("three")


def test_a_turn_computes_what_is_new_until_a_reset_or_another_adapter(model: Any, tokenizer: Any) -> None:
    add_lora_(model, LoraConfig(rank=2, alpha=64, target_modules=["down_proj"]), "one")
    session, computed = ChatSession(model, tokenizer, FOUR), list[int]()
    model.register_forward_pre_hook(
        lambda module, args, options: computed.append(options["input_ids"].shape[1]), with_kwargs=True
    )

    def prompt_tokens(text: str) -> int:
        computed.clear()
        session.ask(text)
        return computed[0]

    first, second = prompt_tokens("a b c d"), prompt_tokens("e")
    assert first == 10 and second < 10 < len(session._prompt([*session.messages, {"role": "user", "content": "e"}])[0])
    session.use("one")  # it answers already
    assert prompt_tokens("f") < 10
    for change in (session.reset, lambda: session.use(None), session.reset):
        change()
        assert session._kept.tokens == 0
        prompt_tokens("a b c d")
        assert session._kept.tokens


def test_a_template_without_system_messages_is_found_at_once(model: Any, tokenizer: Any) -> None:
    deaf = copy.deepcopy(tokenizer)
    deaf.chat_template = deaf.chat_template.replace("in messages", "in messages if message.role != 'system'")
    ChatSession(model, deaf, FOUR)
    with pytest.raises(ConfigError, match=r"the chat template takes no system message \(.*\); leave it out"):
        ChatSession(model, deaf, FOUR, system="be")


def test_an_answer_needs_room(model: Any, tokenizer: Any) -> None:
    model.config.max_position_embeddings = 4
    with pytest.raises(ConfigError, match="max_new_tokens must leave room for a question in 4 positions; got 4"):
        ChatSession(model, tokenizer, FOUR)
