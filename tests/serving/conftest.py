"""A server of the tiny model, with an adapter, in this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.lora import lora_layers
from qlora_lite.serving import Answers, Limits, make_app
from qlora_lite.serving.server import Server, address_of, listen


@pytest.fixture(scope="session")
def talking(tiny_folder: Path) -> tuple[Any, Any]:
    """The tiny model with an adapter that changes what it says, and its tokenizer."""
    model = load_quantized(tiny_folder, QuantConfig(format="none"))
    add_lora_(model, LoraConfig(rank=2, alpha=64, target_modules=["down_proj"]), "loud")
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=2.0)
    return model, load_tokenizer(tiny_folder)


@pytest.fixture
def make_answers(talking: tuple[Any, Any]) -> Iterator[Callable[..., Answers]]:
    made: list[Answers] = []

    def make(**limits: Any) -> Answers:
        made.append(Answers(*talking, {"loud": "loud", "tiny": None}, Limits(**{"new_tokens": 1500, **limits})))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def start(make_answers: Callable[..., Answers]) -> Iterator[Callable[..., str]]:
    """Starts servers; returns the address."""
    running: list[tuple[Server, threading.Thread, socket.socket]] = []

    def start(token: str | None = None, **limits: Any) -> str:
        answers, listening = make_answers(**limits), listen("127.0.0.1", 0)
        server = Server(make_app(answers, token), answers.end)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        running.append((server, thread, listening))
        return address_of(listening)

    yield start
    for server, thread, listening in running:
        server._on_end()
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()
