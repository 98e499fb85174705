"""A terminal in which commands run, and an adapter that changes what the tiny model says."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

Run = Callable[..., subprocess.CompletedProcess[str]]
CTRL_C = "\x03"
SECONDS = 60.0


class Terminal:
    """A terminal in which a command runs: its screen as text so far, and keys to press."""

    def __init__(self, run: Run, *words: object) -> None:
        self._master, self._slave = pty.openpty()
        self.screen, self.status = "", -1
        self._seen = 0
        self._thread = threading.Thread(target=self._run, args=(run, *words))
        self._thread.start()

    def _run(self, run: Run, *words: object) -> None:
        self.status = run(*words, terminal=os.ttyname(self._slave)).returncode

    def press(self, keys: str) -> None:
        if keys == CTRL_C:
            time.sleep(0.2)  # a signal between the prompt and the wait for a key is noticed with the next key only
        os.write(self._master, keys.encode())

    def wait_for(self, text: str) -> str:
        """Returns what is shown up to this text, behind what was waited for before."""
        until = time.monotonic() + SECONDS
        while (end := self.screen.find(text, self._seen)) < 0:
            assert time.monotonic() < until, f"no {text!r} in {self.screen!r}"
            self._read(0.05)
        before, self._seen = self.screen[self._seen : end], end + len(text)
        return before

    def _read(self, seconds: float) -> None:
        if select.select([self._master], [], [], seconds)[0]:
            self.screen += os.read(self._master, 4096).decode(errors="replace").replace("\r\n", "\n")

    def ended(self) -> int:
        """Waits for the command and returns its exit status."""
        until = time.monotonic() + SECONDS
        while self._thread.is_alive() and time.monotonic() < until:
            self._read(0.05)
        self._read(0.05)
        assert not self._thread.is_alive(), self.screen
        return self.status

    def close(self) -> None:
        os.close(self._slave)
        os.close(self._master)
        self._thread.join(SECONDS)


@pytest.fixture
def terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Terminal]]:
    monkeypatch.setenv("TERM", "dumb")
    opened: list[Terminal] = []

    def open_terminal(*words: object) -> Terminal:
        opened.append(Terminal(run, *words))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


@pytest.fixture(scope="session")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the tiny model says."""
    from qlora_lite import LoraConfig, add_lora_, load_quantized, save_adapter

    model = load_quantized(tiny_folder)
    add_lora_(model, LoraConfig(rank=2, alpha=64, target_modules=["down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("runs") / "loud" / "adapter"
    save_adapter(model, folder)
    return folder
