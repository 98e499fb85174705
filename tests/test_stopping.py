"""Signals wait for a poll, come when there was none, and leave the handlers as they were."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from qlora_lite.errors import Stopped
from qlora_lite.stopping import poll, stoppable, unstopped


class Came(Exception):
    pass


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    def came(number: int, frame: Any) -> None:
        raise Came(number)

    before = {number: signal.signal(number, came) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_poll_obeys_and_the_handlers_come_back(number: int, status: int) -> None:
    handler = signal.getsignal(number)
    with pytest.raises(Stopped, match="stopped by SIG") as stop, stoppable():
        signal.raise_signal(number)
        with stoppable(), unstopped():
            poll()
        poll()
    assert stop.value.code == status and signal.getsignal(number) is handler
    poll()


def test_what_no_poll_obeyed_is_sent_again_and_a_second_interrupt_is_at_once() -> None:
    with pytest.raises(Came), stoppable():
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stoppable():
        signal.raise_signal(signal.SIGINT)
        with unstopped():
            signal.raise_signal(signal.SIGINT)


def test_ignored_signals_and_other_threads_change_nothing() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stoppable():
        signal.raise_signal(signal.SIGINT)
        poll()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    said: list[str] = []

    def elsewhere() -> None:
        with stoppable():
            poll()
            said.append("done")

    with pytest.raises(Stopped), stoppable():
        signal.raise_signal(signal.SIGTERM)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        poll()
    assert said == ["done"]
