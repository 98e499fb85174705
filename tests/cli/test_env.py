"""Tests of `qlora-lite env`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import torch

from qlora_lite.choices import DEFAULTS

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_env_says_what_there_is(run: Run) -> None:
    figures = json.loads(run("env", "--json").stdout.splitlines()[-1])
    assert figures["choices"] == DEFAULTS  # as the tests ask for
    assert figures["choices_timed"] == "no, QLORA_LITE_CHOICES asks for the defaults"
    assert figures["torch"].startswith(torch.__version__.split("+")[0]) and figures["memory_bytes"] > 0
