"""Tests of signals that wait for a check, and of handlers that are restored."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite import LinearWithLoRA
from qlora_lite.checkpoints.lazy_tensors import read_slices
from qlora_lite.checkpoints.safetensors_read import read_safetensors
from qlora_lite.checkpoints.safetensors_write import planned, write_safetensors
from qlora_lite.data.stream import BatchStream
from qlora_lite.errors import Stopped
from qlora_lite.export.weight_rows import DenseRows, whole_slices
from qlora_lite.lora.init import initialize_
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.signals import (
    check_signals,
    deferred_signals,
    exit_on_signals,
    interrupts_to,
    obeyed_at_once,
    removed_at_end,
    uninterrupted,
)
from qlora_lite.training.run_checkpoints import MANIFEST_FILE, checkpoint_problem
from qlora_lite.training.run_state import STATE_FILE, base_fingerprint


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
    with pytest.raises(Stopped, match="stopped by SIG") as stop, deferred_signals():
        signal.raise_signal(number)
        with deferred_signals(), uninterrupted():
            check_signals()
        check_signals()
    assert stop.value.code == status and signal.getsignal(number) is handler
    check_signals()


SIMULATED_BREAK = """
import signal
signal.SIGBREAK = signal.SIGUSR1
from qlora_lite.errors import Stopped
from qlora_lite.signals import check_signals, deferred_signals
try:
    with deferred_signals():
        signal.raise_signal(signal.SIGBREAK)
        print("went on", flush=True)
        check_signals()
except Stopped as stop:
    print(stop.code)
"""


def test_simulated_the_break_key_of_windows_waits_like_the_others() -> None:
    done = subprocess.run([sys.executable, "-c", SIMULATED_BREAK], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["went on", str(128 + signal.SIGUSR1), ""]


def test_what_no_poll_obeyed_is_sent_again_and_a_second_interrupt_is_at_once() -> None:
    with pytest.raises(Came), deferred_signals():
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), deferred_signals():
        signal.raise_signal(signal.SIGINT)
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)


def test_ignored_signals_and_other_threads_change_nothing() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred_signals():
        signal.raise_signal(signal.SIGINT)
        check_signals()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    said: list[str] = []

    def elsewhere() -> None:
        with deferred_signals():
            check_signals()
            said.append("done")

    with pytest.raises(Stopped), deferred_signals():
        signal.raise_signal(signal.SIGTERM)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        check_signals()
    assert said == ["done"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_ends_at_once_but_waits_where_it_is_asked(number: int) -> None:
    handler, hook = signal.getsignal(number), sys.unraisablehook
    done: list[str] = []
    with pytest.raises(Stopped) as stop, exit_on_signals(""):
        signal.raise_signal(number)
        done.append("went on")
    assert stop.value.code == 128 + number
    with pytest.raises(Stopped), exit_on_signals(""):
        with deferred_signals():
            with deferred_signals():
                signal.raise_signal(number)
            done.append("waited")
        done.append("went on")
    with pytest.raises(Stopped), exit_on_signals(""), deferred_signals():
        signal.raise_signal(number)
        raise ValueError  # what went wrong after a signal is not why it ended
    assert done == ["waited"] and signal.getsignal(number) is handler and sys.unraisablehook is hook


def test_a_signal_that_was_swallowed_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    class Finalized:
        def __init__(self, *numbers: int) -> None:
            self.numbers = numbers

        def __del__(self) -> None:
            for number in self.numbers:
                signal.raise_signal(number)

    def dropped(*numbers: int) -> None:
        Finalized(*numbers)
        said.append("went on")

    said: list[str] = []
    with pytest.raises(Stopped), exit_on_signals(""):
        dropped(signal.SIGTERM)
        check_signals()
    with pytest.raises(Stopped), exit_on_signals(""):
        dropped(signal.SIGINT)
    assert said == ["went on"] * 2 and capsys.readouterr().err == ""


def test_a_second_interrupt_leaves_a_command_then_and_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "kept").touch()

    def leave() -> None:
        with (
            exit_on_signals("the last words"),
            deferred_signals(),
            removed_at_end(tmp_path / "folder"),
            uninterrupted(),
        ):
            (tmp_path / "folder" / "file").touch()
            with removed_at_end(tmp_path / "file"), suppress(BaseException):
                (tmp_path / "file").touch()
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)

    child = os.fork()
    if child == 0:
        leave()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert os.listdir(tmp_path) == ["kept"] and capfd.readouterr().err == "the last words\n"


@dataclass(frozen=True)
class _Rows:
    name, dtype, shape = "rows", torch.float32, (4, 4)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(stop - start, 4)


def _traced() -> None:
    with StorageTrace():
        torch.zeros(2).add(1)


def _read(folder: Path) -> Any:
    with uninterrupted():
        write_safetensors(folder / "a.safetensors", {"a": planned(torch.zeros(2))})
    return read_safetensors(folder / "a.safetensors")


LONG_WORK: dict[str, Callable[[Path], Any]] = {
    "reading files": _read,
    "rows of files": lambda folder: list(read_slices(_Rows(), 16)),
    "rows of weights": lambda folder: list(whole_slices([DenseRows(torch.zeros(4, 4))], None, 16)),
    "sums of a base": lambda folder: base_fingerprint(nn.Linear(2, 2).requires_grad_(False)),
    "sums of a checkpoint": lambda folder: checkpoint_problem(folder),
    "batches": lambda folder: next(BatchStream([{}], None, None).take(1, 1, 1)),
    "operators that are followed": lambda folder: _traced(),
    "starts of adapters": lambda folder: initialize_(LinearWithLoRA(2, 2, 1), "name", "normal", {}),
}


@pytest.mark.parametrize("what", LONG_WORK)
def test_long_work_asks(what: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"files": {STATE_FILE: {}}}))
    (tmp_path / STATE_FILE).write_text("{}")
    with pytest.raises(Stopped), deferred_signals():
        signal.raise_signal(signal.SIGTERM)
        LONG_WORK[what](tmp_path)
        pytest.fail("it did not ask")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_waits_obeys_at_once(number: signal.Signals) -> None:
    reached = []
    with pytest.raises(Stopped, match=f"^stopped by {number.name}; "), deferred_signals(), obeyed_at_once():
        reached.append("within")
        signal.raise_signal(number)
        reached.append("after")
    assert reached == ["within"]
    with pytest.raises(Stopped), deferred_signals():
        signal.raise_signal(number)  # deferred
        with obeyed_at_once():
            reached.append("begun")
    with pytest.raises(Stopped), deferred_signals():
        with obeyed_at_once():
            pass
        signal.raise_signal(number)
        reached.append("deferred again")
        check_signals()
    assert reached == ["within", "deferred again"]
    with obeyed_at_once():
        reached.append("outside")


def test_an_interrupt_is_taken_first_and_handed_on_if_refused() -> None:
    taken: list[bool] = []

    def take() -> bool:
        taken.append(len(taken) == 0)
        return taken[-1]

    with pytest.raises(Stopped), exit_on_signals("at once"):
        before = signal.getsignal(signal.SIGINT)
        with interrupts_to(take):
            signal.raise_signal(signal.SIGINT)
            assert taken == [True]
            with pytest.raises(Stopped):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == before and taken == [True, False]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_to(take):
        signal.raise_signal(signal.SIGINT)  # ignored signals stay ignored
    assert taken == [True, False]
