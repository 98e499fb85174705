"""The command line in this process, with words and an input."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from qlora_lite.cli.main import main


@pytest.fixture
def qlora_lite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `qlora-lite` with these words and this input in this process: (exit status, stdout, stderr)."""

    def run(*words: object, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qlora-lite", *map(str, words)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run
