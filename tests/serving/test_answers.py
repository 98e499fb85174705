"""Tests of Answers: one at a time, in a short queue, for a limited time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from qlora_lite.errors import ConfigError
from qlora_lite.serving.answers import Answers, Cancel, Limits
from qlora_lite.serving.wanted import RequestError, Wanted, wanted_text

LONG = {"model": "tiny", "prompt": "abc"}


def wanted(**change: Any) -> Wanted:
    return wanted_text({"model": "tiny", "prompt": "abc", **change})


def ignore(text: str) -> None:
    """Nobody listens."""


def test_each_model_answers_as_itself(make_answers: Callable[..., Answers]) -> None:
    answers, heard = make_answers(), list[str]()
    plain, loud, again = (
        answers.submit(wanted(model=name, max_tokens=6), heard.append, Cancel()).result()
        for name in ("tiny", "loud", "tiny")
    )
    assert plain == again and plain.answer.text != loud.answer.text
    assert "".join(heard) == plain.answer.text + loud.answer.text + plain.answer.text
    assert (plain.prompt_tokens, plain.answer.tokens, plain.answer.finish_reason) == (3, 6, "length")


def test_the_next_turn_of_the_last_conversation_computes_what_is_new(make_answers: Callable[..., Answers]) -> None:
    answers, computed = make_answers(), list[int]()
    hook = answers._model.register_forward_pre_hook(
        lambda module, args, options: computed.append(options["input_ids"].shape[1]), with_kwargs=True
    )

    def ask(prompt: str, model: str = "tiny") -> tuple[int, str]:
        computed.clear()
        made = answers.submit(wanted(model=model, prompt=prompt, max_tokens=6), ignore, Cancel()).result()
        return computed[0], made.answer.text

    try:
        fresh = {name: ask("abcdef", name)[1] for name in ("tiny", "loud")}
        assert ask("abcdef", "loud") == (1, fresh["loud"])
        assert ask("abcdef") == (6, fresh["tiny"])  # of the other adapter nothing is valid
        assert ask("abcdxy")[0] == 2
        assert ask("zzz")[0] == 3
    finally:
        hook.remove()


def test_a_stop_text_ends_an_answer(make_answers: Callable[..., Answers]) -> None:
    answers = make_answers()
    whole = answers.submit(wanted(max_tokens=12), ignore, Cancel()).result().answer
    stop = whole.text[3:5]
    cut = answers.submit(wanted(stop=[stop]), ignore, Cancel()).result().answer
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens < whole.tokens


def test_the_queue_is_short_and_cancelled_answers_make_room(make_answers: Callable[..., Answers]) -> None:
    answers = make_answers(queue=1)
    cancels = [Cancel(), Cancel()]
    first, second = (answers.submit(wanted(), ignore, cancel) for cancel in cancels)
    with pytest.raises(RequestError, match="2 requests wait already; try again later") as full:
        answers.submit(wanted(), ignore, Cancel())
    assert (full.value.status, full.value.code) == (503, "queue_full")
    for cancel in cancels:
        cancel()
    assert first.result().answer.tokens < 1500
    with pytest.raises(RequestError, match="nobody waits for this answer any more"):
        second.result()
    assert answers.submit(wanted(max_tokens=1), ignore, Cancel()).result().answer.tokens == 1


def test_time_is_limited_in_the_queue_and_in_the_answer(make_answers: Callable[..., Answers]) -> None:
    answers = make_answers(seconds=0.5)
    began = time.monotonic()
    both_wait = threading.Event()  # so that the second one came before the first one began, which takes all its time
    answers._thread.submit(both_wait.wait)
    first, second = (answers.submit(wanted(), ignore, Cancel()) for _ in range(2))
    both_wait.set()
    assert first.result().answer.finish_reason == "length" and first.result().answer.tokens < 1500
    with pytest.raises(RequestError, match=r"waited for more than 0\.5 seconds"):
        second.result()
    assert time.monotonic() - began < 10


def test_what_has_no_room_is_refused(make_answers: Callable[..., Answers]) -> None:
    answers = make_answers()
    with pytest.raises(RequestError, match="max_tokens must be at most 1,500 here; got 1,501"):
        answers.submit(wanted(max_tokens=1501), ignore, Cancel())
    with pytest.raises(RequestError, match="the prompt has 2,000 tokens, and the model was made for 2,048") as long:
        answers.submit(wanted(prompt="x" * 2000, max_tokens=49), ignore, Cancel())
    assert long.value.code == "context_length_exceeded"
    done = answers.submit(wanted(prompt="x" * 2045), ignore, Cancel()).result()
    assert done.answer.tokens == 3  # what is left
    with pytest.raises(RequestError, match="there is no model 'x'; there are: loud, tiny") as unknown:
        answers.submit(wanted(model="x"), ignore, Cancel())
    assert unknown.value.status == 404


@pytest.mark.parametrize("options", [{"new_tokens": 0}, {"queue": -1}, {"seconds": 0}, {"seconds": float("nan")}])
def test_limits_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Limits(**options)
