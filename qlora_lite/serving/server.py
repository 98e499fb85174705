"""The address that is listened at, and the running server."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from qlora_lite.checkpoints.files import reason
from qlora_lite.errors import ConfigError

CONNECTIONS = 64
CLOSING_SECONDS = 5


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens there. Raises ConfigError with the system's reason if that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen at {host!r}, port {port} ({reason(error)}); choose another --host or --port"
        ) from error


def address_of(listening: socket.socket) -> str:
    """The address of a socket for a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """A server that says, when a signal ends it, that answers are to end too; without it would wait for them."""

    def __init__(self, app: Any, on_end: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=CLOSING_SECONDS,
            )
        )
        self._on_end = on_end

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Is called by SIGINT and SIGTERM."""
        self._on_end()
        super().handle_exit(sig, frame)
