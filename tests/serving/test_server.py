"""Tests of the address of a server; test_app.py and the command's tests run one."""

from __future__ import annotations

import pytest

from qlora_lite.errors import ConfigError
from qlora_lite.serving.server import address_of, listen


def test_an_address_that_is_taken_or_wrong_is_one_sentence() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address_of(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(
            ConfigError, match=rf"cannot listen at '127.0.0.1', port {port} \(.*\); choose another --host"
        ):
            listen("127.0.0.1", port)
    for host in ("256.1.1.1", "192.0.2.1", "no such host", "x" * 300):
        with pytest.raises(ConfigError, match="cannot listen at "):
            listen(host, 0)
